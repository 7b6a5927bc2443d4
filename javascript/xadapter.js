// Says in plain words, under the two sliders, what the next picture will do and which plugin goes to which model.
(function () {
    "use strict";

    const ID = "script_xadapter_";
    const PAUSE = 400; // milliseconds without typing before the server is asked
    let asked = "";
    let timer;

    function number(id) {
        const field = gradioApp().querySelector(`#${id} input[type=number]`);
        return field === null ? NaN : Number(field.value);
    }

    function checked(id) {
        const box = gradioApp().querySelector(`#${id} input[type=checkbox]`);
        return box !== null && box.checked;
    }

    // The size that the extension takes for 0: half, as a multiple of 8, at least 64 (settings.py, half).
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

    function text(id) {
        const field = gradioApp().querySelector(`#${id} textarea`);
        return field === null ? "" : field.value;
    }

    function chosen(id) {
        const field = document.getElementById(id)?.querySelector("input");
        return field ? field.value : "None";
    }

    // The ControlNet extension's units, in its tabs' order: what it takes over REST, less the images.
    function units() {
        const boxes = gradioApp().querySelectorAll("#txt2img_controlnet [id$=_controlnet_enable_checkbox]");
        return Array.from(boxes, (box) => {
            const unit = box.id.slice(0, -"_enable_checkbox".length);
            return {
                enabled: checked(box.id),
                module: chosen(`${unit}_preprocessor_dropdown`),
                model: chosen(`${unit}_model_dropdown`),
            };
        });
    }

    function selection() {
        return JSON.stringify({
            prompt: text("txt2img_prompt"),
            negative_prompt: text("txt2img_neg_prompt"),
            base_prompt: text(ID + "base_prompt"),
            base_negative_prompt: text(ID + "base_negative_prompt"),
            units: units(),
            base_checkpoint: chosen(ID + "base_checkpoint"),
        });
    }

    // The page's own login (--gradio-auth) is enough; the API's password (--api-auth) is not needed.
    async function route(body) {
        const answer = await fetch("./xadapter/v1/route", {
            method: "POST",
            headers: {"Content-Type": "application/json"},
            credentials: "same-origin",
            body: body,
        });
        const summary = answer.ok ? (await answer.json()).summary : "";
        const place = gradioApp().querySelector(`#${ID}plugins`);
        if (place !== null && body === asked) {
            place.textContent = summary === "" ? "" : `Plugins: ${summary}.`;
        }
    }

    function updatePlugins() {
        const body = selection();
        if (body === asked || !checked(ID + "enabled-checkbox")) {
            return;
        }
        asked = body;
        clearTimeout(timer);
        timer = setTimeout(() => route(body).catch((problem) => console.warn("X-Adapter:", problem)), PAUSE);
    }

    // style.css shows the base's LoRA cards while this class is there.
    function updateCards() {
        document.body.classList.toggle("xadapter-on", checked(ID + "enabled-checkbox"));
    }

    function update() {
        updateCards();
        updateExplanation();
        updatePlugins();
    }

    function updateExplanation() {
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
