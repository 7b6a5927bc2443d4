// Says in plain words, under the two sliders, what the next picture will do.
(function () {
    "use strict";

    const ID = "script_xadapter_";

    function number(id) {
        const field = gradioApp().querySelector(`#${id} input[type=number]`);
        return field === null ? NaN : Number(field.value);
    }

    function checked(id) {
        const box = gradioApp().querySelector(`#${id} input[type=checkbox]`);
        return box !== null && box.checked;
    }

    // The size that the extension takes for 0: half, as a multiple of 8, at least 64 (generation.py, half).
    function baseSize(own, target) {
        return own || Math.max(Math.floor(target / 16) * 8, 64);
    }

    function explanation() {
        const steps = number("txt2img_steps");
        const width = number("txt2img_width");
        const height = number("txt2img_height");
        const size = `${baseSize(number(ID + "base_width"), width)}×${baseSize(number(ID + "base_height"), height)}`;
        if (checked(ID + "single_stage")) {
            return `SD1.5 at ${size} and SDXL at ${width}×${height} start from noise together, for ${steps} steps.`;
        }
        const baseSteps = number(ID + "base_steps") || steps;
        const joint = Math.min(Math.floor(Math.min(number(ID + "switch_point"), 0.999) * steps) + 1, steps);
        return `SD1.5 paints ${size} in ${baseSteps} steps; then SDXL paints ${width}×${height} over it in ${joint} ` +
            `of ${steps} steps, led by SD1.5.`;
    }

    function update() {
        const place = gradioApp().querySelector(`#${ID}explanation`);
        if (place === null) {
            return;
        }
        const text = explanation();
        if (!text.includes("NaN") && place.textContent !== text) {
            place.textContent = text;
        }
    }

    onAfterUiUpdate(update);
    onUiLoaded(() => gradioApp().addEventListener("input", update));
})();
