// Asks the server what the next picture will do and which plugin goes to which model, and says so in the accordion.
(function () {
    "use strict";

    const TABS = ["txt2img", "img2img"];
    const PAUSE = 400; // milliseconds without a change before the server is asked
    const NOTHING_KNOWN = {line: ""};
    const asked = {};
    let timer;

    function find(id) {
        return document.getElementById(id);
    }

    function number(id) {
        const field = find(id)?.querySelector("input[type=number]");
        return field ? field.valueAsNumber : NaN;
    }

    function checked(id) {
        return find(id)?.querySelector("input[type=checkbox]")?.checked ?? false;
    }

    function text(id) {
        return find(id)?.querySelector("textarea")?.value ?? "";
    }

    // Those that are selected, as the dropdown shows them.
    function styles(tab) {
        return Array.from(find(`${tab}_styles`)?.querySelectorAll(".token > span") ?? [], (name) => name.textContent);
    }

    function chosen(id) {
        return find(id)?.querySelector("input")?.value ?? "None";
    }

    // The value of a control of whichever kind, null where there is none.
    function value(id) {
        const control = find(id);
        const field = control?.querySelector("input[type=radio]:checked, input:not([type=radio]), textarea");
        if (!field) {
            return null;
        }
        if (field.type === "checkbox") {
            return field.checked;
        }
        return control.querySelector("input[type=number]") ? number(id) : field.value;
    }

    function accordion(tab) {
        return find(`script_${tab}_xadapter_enabled`);
    }

    function line(tab, name) {
        return find(`script_${tab}_xadapter_${name}`);
    }

    function isTicked(tab) {
        return checked(`script_${tab}_xadapter_enabled-checkbox`);
    }

    // X-Adapter's arguments, as the page hands them to the server for a picture.
    function argumentsOf(tab) {
        const [, ...others] = line(tab, "forecast").dataset.controls.split(" ");
        return [isTicked(tab), ...others.map(value)];
    }

    // The ControlNet extension's units, in its tabs' order: what it takes over REST, less the images.
    function units(tab) {
        const boxes = document.querySelectorAll(`#${tab}_controlnet [id$=_controlnet_enable_checkbox]`);
        return Array.from(boxes, (box) => {
            const unit = box.id.slice(0, -"_enable_checkbox".length);
            return {
                enabled: checked(box.id),
                module: chosen(`${unit}_preprocessor_dropdown`),
                model: chosen(`${unit}_model_dropdown`),
            };
        });
    }

    function hires() {
        return {
            enable_hr: checked("txt2img_hr-checkbox"),
            hr_scale: number("txt2img_hr_scale"),
            hr_resize_x: number("txt2img_hr_resize_x"),
            hr_resize_y: number("txt2img_hr_resize_y"),
            hr_second_pass_steps: number("txt2img_hires_steps"),
            hr_prompt: text("hires_prompt"),
            hr_negative_prompt: text("hires_neg_prompt"),
        };
    }

    // What "Resize by" starts from, where that tab is open.
    function resizing() {
        const tab = find("img2img_tab_resize_by");
        if (!tab || getComputedStyle(tab).display === "none") {
            return {};
        }
        const [width, height, scale] = currentImg2imgSourceResolution(0, 0, number("img2img_scale"));
        return {scale_by: scale, source_width: width, source_height: height};
    }

    function request(tab) {
        if (!isTicked(tab)) {
            return {tab, args: [false]};
        }
        return {
            tab,
            args: argumentsOf(tab),
            prompt: text(`${tab}_prompt`),
            negative_prompt: text(`${tab}_neg_prompt`),
            styles: styles(tab),
            units: units(tab),
            width: number(`${tab}_width`),
            height: number(`${tab}_height`),
            steps: number(`${tab}_steps`),
            denoising_strength: number(`${tab}_denoising_strength`),
            ...(tab === "txt2img" ? hires() : resizing()),
        };
    }

    // A number that is being typed can be none for a moment.
    function isWhole(request) {
        return [...Object.values(request), ...request.args].every((part) => !Number.isNaN(part));
    }

    // The page's own login (--gradio-auth) is enough; the API's password (--api-auth) is not needed.
    async function answerTo(body) {
        const answer = await fetch("./xadapter/v1/plan", {
            method: "POST",
            headers: {"Content-Type": "application/json"},
            credentials: "same-origin",
            body: body,
        });
        if (!answer.ok) {
            throw new Error(`no forecast: status ${answer.status}`);
        }
        return answer.json();
    }

    async function ask(tab, body) {
        const answer = await answerTo(body).catch((problem) => {
            console.warn("X-Adapter:", problem);
            return null;
        });
        // another question may have been asked meanwhile
        if (body === asked[tab]) {
            // what got no answer is asked again when the page next changes
            asked[tab] = answer && body;
            show(tab, answer ?? NOTHING_KNOWN);
        }
    }

    function show(tab, {line: forecast, problem, base, summary}) {
        line(tab, "forecast").textContent = forecast;
        line(tab, "forecast").classList.toggle("xadapter-problem", problem === true);
        line(tab, "plugins").textContent = summary ? `Plugins: ${summary}.` : "";
        if (base) {
            nameBase(tab, base);
        }
    }

    // Labels and tooltips name SD1.5; with a base of another family they name that.
    function nameBase(tab, name) {
        const families = new RegExp(line(tab, "forecast").dataset.families, "g");
        const labels = "label, label > span, [data-testid=block-info], [id$=preset_advice] .prose";
        for (const part of Array.from(accordion(tab).querySelectorAll(labels)).flatMap((label) => [...label.childNodes])) {
            if (part.nodeType === Node.TEXT_NODE) {
                part.data = part.data.replaceAll(families, name);
            }
        }
        for (const attribute of ["title", "placeholder"]) {
            for (const element of accordion(tab).querySelectorAll(`[${attribute}]`)) {
                element.setAttribute(attribute, element.getAttribute(attribute).replaceAll(families, name));
            }
        }
    }

    function update() {
        for (const tab of TABS.filter(accordion)) {
            // style.css shows the base's LoRA cards while this class is there
            find(`tab_${tab}`).classList.toggle("xadapter-on", isTicked(tab));
            const wanted = request(tab);
            const body = JSON.stringify(wanted);
            if (body !== asked[tab] && isWhole(wanted)) {
                asked[tab] = body;
                ask(tab, body);
            }
        }
    }

    function soon() {
        clearTimeout(timer);
        timer = setTimeout(() => {
            timer = undefined;
            update();
        }, PAUSE);
    }

    // The headers of accordions open by a click alone; here also by Enter and the space bar.
    function openByKeyboard(header) {
        const tell = () => header.setAttribute("aria-expanded", header.classList.contains("open"));
        header.tabIndex = 0;
        header.setAttribute("role", "button");
        header.addEventListener("keydown", (event) => {
            if (event.target === header && ["Enter", " "].includes(event.key)) {
                event.preventDefault();
                header.click();
            }
        });
        new MutationObserver(tell).observe(header, {attributes: true, attributeFilter: ["class"]});
        tell();
    }

    onUiLoaded(() => {
        for (const event of ["input", "change", "click"]) {
            gradioApp().addEventListener(event, soon);
        }
        for (const tab of TABS.filter(accordion)) {
            accordion(tab).querySelectorAll(".label-wrap").forEach(openByKeyboard);
        }
        soon();
    });
    // the page changes all the time while a picture is made, which must not put the question off
    onAfterUiUpdate(() => timer === undefined && soon());
})();
