// "Save this answer": a picture of the answer, drawn here, to send on.
(() => {
    const WIDTH = 1200, HEIGHT = 630, SIDE = 570, FONT = '"Source Sans Pro", system-ui, sans-serif';
    const find = (selector) => document.querySelector(selector);

    const fit = (context, text, width) => {
        if (context.measureText(text).width <= width) return text;
        while (text && context.measureText(`${text}…`).width > width) text = text.slice(0, -1);
        return `${text}…`;
    };

    const draw = () => {
        const canvas = Object.assign(document.createElement("canvas"), { width: WIDTH, height: HEIGHT });
        const context = canvas.getContext("2d"), stage = find("#stage .stage");
        const source = stage.querySelector(".moving") ?? stage.querySelector(".picture");
        const write = (text, x, y, size, colour, { weight = 400, align = "left", width = 510 } = {}) => {
            context.font = `${weight} ${size}px ${FONT}`;
            context.fillStyle = colour;
            context.textAlign = align;
            context.fillText(fit(context, text, width), x, y);
        };
        context.fillStyle = "#ffffff";
        context.fillRect(0, 0, WIDTH, HEIGHT);

        // The picture with what lies over it, as large as fits the left half.
        const [w, h] = [source.videoWidth || source.naturalWidth, source.videoHeight || source.naturalHeight];
        const scale = Math.min(SIDE / w, SIDE / h), [width, height] = [Math.max(1, w * scale), Math.max(1, h * scale)];
        const [left, top] = [30 + (SIDE - width) / 2, 30 + (SIDE - height) / 2];
        const map = stage.querySelector("canvas.heat"), seen = stage.querySelector(".seen").style;
        context.filter = map.hidden ? "none" : getComputedStyle(source).filter;
        context.drawImage(source, left, top, width, height);
        context.filter = "none";
        const part = (name, whole) => (parseFloat(seen[name]) / 100) * whole;
        if (!map.hidden) {
            context.globalAlpha = getComputedStyle(map).opacity;
            context.drawImage(map, left + part("left", width), top + part("top", height), part("width", width), part("height", height));
            context.globalAlpha = 1;
        }
        const paper = stage.querySelector(".paper");
        if (paper) context.drawImage(paper, left, top, width, height);

        [...document.querySelectorAll("#answer .bar")].slice(0, 3).forEach((bar, n) => {
            const y = 130 + 120 * n, label = bar.querySelector(".label").textContent, weight = n ? 400 : 700;
            write(label, 640, y, n ? 34 : 44, "#1f2937", { weight, width: 400 });
            write(bar.querySelector(".score").textContent, 1160, y, 34, "#5b6779", { align: "right", width: 120 });
            context.fillStyle = "#e6eaf0";
            context.fillRect(640, y + 18, 520, 14);
            context.fillStyle = "#d9480f";
            context.fillRect(640, y + 18, Math.max(3, 520 * parseFloat(bar.style.getPropertyValue("--share"))), 14);
        });
        write(stage.querySelector("figcaption").textContent, 640, 490, 22, "#5b6779", { width: 520 });
        write(find("#answer .answer").getAttribute("aria-label").replace("Answer of ", ""), 640, 550, 24, "#1f2937", { width: 520 });
        write("ConvMixer · Patches Are All You Need?", 640, 585, 22, "#5b6779", { width: 520 });
        return canvas;
    };

    const save = async () => {
        const blob = await new Promise((done) => draw().toBlob(done, "image/png"));
        const name = find("#answer .bar .label").textContent.replace(/[^\p{L}\p{N}]+/gu, "-");
        const anchor = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: `convmixer-${name}.png` });
        anchor.click();
        setTimeout(() => URL.revokeObjectURL(anchor.href), 10_000);
    };
    document.addEventListener("click", (event) => {
        if (event.target.closest("#save")) save();
    });
})();
