"""Each figure on cases whose answer is known."""

from __future__ import annotations

import numpy
import pytest
import torch
from PIL import Image, ImageChops, ImageDraw
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from lib_xadapter.errors import WrongFile
from lib_xadapter.evaluation.figures.clip import Clip, similarity
from lib_xadapter.evaluation.figures.condition import edge_f1, map_similarity
from lib_xadapter.evaluation.figures.frechet import FrechetDistance, Inception
from lib_xadapter.evaluation.intervals import compare
from lib_xadapter.evaluation.maps import DepthEstimator, canny, fitted


def frechet(features, reference) -> float:
    return float(FrechetDistance(features, reference)(numpy.ones((1, len(features)), dtype=int))[0])


def by_torch_fidelity(features, reference) -> float:
    statistics = [fid_features_to_statistics(torch.tensor(one)) for one in (features, reference)]
    return fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]


class TestFrechetDistance:
    def test_equal_sets_are_at_distance_0(self, noise):
        features = noise.normal(size=(40, 12))
        assert frechet(features, features[::-1]) == pytest.approx(0, abs=1e-9)

    def test_a_shift_counts_by_its_square(self, noise):
        features, shift = noise.normal(size=(40, 5)), numpy.array([3, 0, -4, 0, 0])
        assert frechet(features + shift, features) == pytest.approx(25)

    def test_gaussians_have_the_closed_form(self, noise):
        """|m|² + Σ (σ₁ − σ₂)² for independent channels."""
        ours, theirs = numpy.array([1.0, 2.0, 0.5]), numpy.array([1.0, 1.0, 2.0])
        mean = numpy.array([0.5, 0.0, -1.0])
        features, reference = (noise.normal(size=(40000, 3)) * scale for scale in (ours, theirs))
        assert frechet(features + mean, reference) == pytest.approx(1.25 + 0 + 1 + 2.25, rel=0.02)

    @pytest.mark.parametrize("pictures", [60, 15], ids=["more pictures than channels", "fewer"])
    def test_it_is_torch_fidelitys(self, noise, pictures):
        features, reference = noise.normal(size=(pictures, 20)), noise.normal(size=(pictures, 20)) ** 2
        assert frechet(features, reference) == pytest.approx(by_torch_fidelity(features, reference), rel=1e-4)

    def test_a_caption_that_counts_twice_is_there_twice(self, noise):
        features, reference = noise.normal(size=(6, 2, 3)), noise.normal(size=(6, 2, 3)) + 1
        counts = numpy.array([2, 0, 1, 1, 2, 0])
        repeated = [numpy.repeat(one, counts, axis=0).reshape(-1, 3) for one in (features, reference)]
        assert FrechetDistance(features, reference)(counts[None])[0] == pytest.approx(frechet(*repeated))

    def test_its_intervals_hold_what_such_samples_have_on_average(self, noise):
        def sample() -> FrechetDistance:
            return FrechetDistance(noise.normal(size=(40, 3)) + 0.5, noise.normal(size=(40, 3)))

        everything = numpy.ones((1, 40), dtype=int)
        average = numpy.mean([sample()(everything)[0] for _ in range(400)])
        estimates = [compare({"way": sample()}, 40, 100, seed).estimates["way"] for seed in range(60)]
        held = numpy.mean([one.low <= average <= one.high for one in estimates])
        assert held >= 0.85

    def test_features_are_those_of_the_weights_given_whatever_the_pictures_size(self, inception_file):
        inception = Inception(inception_file)
        picture = Image.linear_gradient("L").convert("RGB")
        small, large = inception.features([picture.resize((299, 299), Image.Resampling.LANCZOS), picture])
        assert small.shape == (2048,)
        assert numpy.allclose(small, large, atol=1e-5)

    def test_other_files_are_refused_without_being_unpickled(self, tmp_path):
        with pytest.raises(WrongFile, match="--inception: there is no file"):
            Inception(tmp_path / "nowhere.pth")
        torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
        with pytest.raises(WrongFile, match="other.pth holds no weights of torch-fidelity's InceptionV3"):
            Inception(tmp_path / "other.pth")
        torch.save(Picklable(), tmp_path / "code.pth")
        with pytest.raises(WrongFile, match="code.pth holds no weights"):
            Inception(tmp_path / "code.pth")


class Picklable:
    """Fails where it is unpickled."""

    def __reduce__(self):
        return (_unpickled, ())


def _unpickled():
    raise AssertionError("was unpickled")


class TestConditions:
    @pytest.fixture
    def edges(self) -> Image.Image:
        image = Image.new("L", (64, 64))
        ImageDraw.Draw(image).rectangle((12, 12, 50, 40), outline=255)
        return image

    @pytest.fixture
    def random_map(self, noise) -> Image.Image:
        return Image.fromarray((noise.random((64, 64)) < 0.05).astype(numpy.uint8) * 255)

    def test_a_map_is_its_own_likeness(self, edges):
        assert edge_f1(edges, edges) == 1
        assert map_similarity(edges, edges) == pytest.approx(1)

    def test_noise_is_not(self, edges, random_map):
        assert edge_f1(random_map, edges) < 0.5
        assert map_similarity(random_map, edges) < 0.3

    @pytest.mark.parametrize(("off", "expected"), [(1, 1.0), (2, 1.0), (3, 0.0)])
    def test_edges_may_be_two_pixels_off(self, off, expected):
        one, other = Image.new("L", (64, 64)), Image.new("L", (64, 64))
        ImageDraw.Draw(one).line((20, 0, 20, 63), fill=255)
        ImageDraw.Draw(other).line((20 + off, 0, 20 + off, 63), fill=255)
        assert edge_f1(one, other) == expected

    def test_half_of_the_edges_is_whole_precision_and_half_recall(self, edges):
        half = Image.new("L", (64, 64))
        ImageDraw.Draw(half).line((0, 10, 31, 10), fill=255)
        whole = Image.new("L", (64, 64))
        ImageDraw.Draw(whole).line((0, 10, 63, 10), fill=255)
        recall = (32 + 2) / 64
        assert edge_f1(half, whole) == pytest.approx(2 * recall / (1 + recall))

    def test_no_edges_are_like_no_edges_alone(self, edges):
        empty = Image.new("L", (64, 64))
        assert edge_f1(empty, empty) == 1
        assert edge_f1(edges, empty) == edge_f1(empty, edges) == 0

    def test_canny_finds_the_outline_of_a_shape(self, edges):
        filled = Image.new("RGB", (64, 64))
        ImageDraw.Draw(filled).rectangle((12, 12, 50, 40), fill="white")
        assert canny(filled).getcolors(2) is not None
        assert edge_f1(canny(filled), edges) == 1

    def test_a_map_is_made_of_the_middle_of_a_picture(self):
        picture = Image.new("RGB", (300, 100), "red")
        picture.paste("blue", (100, 0, 200, 100))
        middle = fitted(picture, (64, 64))
        assert middle.size == (64, 64)
        # but for the filter at its rims
        inside = middle.crop((3, 0, 61, 64))
        assert ImageChops.difference(inside, Image.new("RGB", inside.size, "blue")).getbbox() is None

    def test_depth_uses_all_grey_levels_at_the_pictures_size(self, depth_folder, noise):
        picture = Image.fromarray(noise.integers(0, 255, (48, 80, 3), dtype=numpy.uint8))
        depth = DepthEstimator(depth_folder)(picture)
        assert (depth.size, depth.mode, depth.getextrema()) == ((80, 48), "L", (0, 255))

    def test_other_folders_hold_no_depth_estimator(self, clip_folder, tmp_path):
        for folder in (tmp_path, clip_folder):
            with pytest.raises(WrongFile, match="--depth: .* holds no depth estimator"):
                DepthEstimator(folder)
        with pytest.raises(WrongFile, match="--depth: there is no folder"):
            DepthEstimator(tmp_path / "nowhere")


class TestClip:
    @pytest.fixture
    def pictures(self, noise) -> list[Image.Image]:
        return [Image.fromarray(noise.integers(0, 255, (40, 64, 3), dtype=numpy.uint8)) for _ in range(2)]

    def test_the_score_is_the_cosine_that_the_whole_model_gives(self, clip_folder, pictures):
        from transformers import CLIPModel, CLIPProcessor

        model, processor = CLIPModel.from_pretrained(clip_folder), CLIPProcessor.from_pretrained(clip_folder)
        texts = ["a cat", "two dogs"]
        told = processor(text=texts, images=pictures, return_tensors="pt", padding=True)
        with torch.no_grad():
            theirs = (model(**told).logits_per_image / model.logit_scale.exp()).diagonal()
        clip = Clip(clip_folder)
        ours = similarity(clip.of_pictures(pictures), clip.of_texts(texts))
        assert ours == pytest.approx(theirs.numpy(), abs=1e-5)

    def test_a_picture_looks_like_itself(self, clip_folder, pictures):
        embedded = Clip(clip_folder).of_pictures(pictures)
        assert similarity(embedded, embedded) == pytest.approx([1, 1], abs=1e-5)
        assert similarity(embedded, embedded[::-1])[0] < 0.999

    def test_long_captions_are_cut_off(self, clip_folder):
        assert Clip(clip_folder).of_texts(["a very long caption " * 40]).shape == (1, 16)

    def test_other_folders_are_refused(self, depth_folder, tmp_path):
        for folder in (tmp_path, depth_folder):
            with pytest.raises(WrongFile, match="--clip: .* holds no CLIP model"):
                Clip(folder)
        with pytest.raises(WrongFile, match="--clip: there is no folder"):
            Clip(tmp_path / "nowhere")
