// Heat maps: the server sends a small grid of evidence for each class, and this paints it.
const heat = (() => {
    const SIDE = 256; // pixels of a painted map's longer side; the browser enlarges it to the picture
    // Viridis: even steps of lightness, so that it reads the same to everyone and in grey.
    const FOR = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];
    const SIGNED = { for: [255, 150, 30], against: [60, 150, 255] };

    // A class's grid as it comes from the server: base64 of int8, one scale for all classes of an answer.
    const decode = (text) => Int8Array.from(atob(text), (byte) => (byte.charCodeAt(0) << 24) >> 24);

    // values (rows x columns, row by row) enlarged to height x width, by Catmull-Rom splines.
    const enlarge = (values, rows, columns, height, width) => {
        const along = (from, lines, count, length, at) => {
            const to = new Float32Array(lines * length);
            for (let i = 0; i < length; i++) {
                const x = ((i + 0.5) * count) / length - 0.5, first = Math.floor(x), t = x - first;
                const weights = [((2 - t) * t - 1) * t, (3 * t - 5) * t * t + 2, ((4 - 3 * t) * t + 1) * t, (t - 1) * t * t];
                weights.forEach((weight, n) => {
                    const k = Math.min(count - 1, Math.max(0, first + n - 1));
                    for (let line = 0; line < lines; line++) to[at(line, i)] += (weight / 2) * from[line * count + k];
                });
            }
            return to;
        };
        // The first pass turns the grid on its side, and the second turns it back.
        const wide = along(values, rows, columns, width, (line, i) => i * rows + line);
        return along(wide, width, rows, height, (line, i) => i * width + line);
    };

    const colour = (value, kind) => {
        const strength = Math.min(1, Math.abs(value));
        if (kind === "signed") return [...SIGNED[value > 0 ? "for" : "against"], 255 * Math.min(1, 1.5 * strength)];
        if (value <= 0) return [0, 0, 0, 0];
        const place = strength * (FOR.length - 1), low = Math.min(FOR.length - 2, Math.floor(place));
        return [...FOR[low].map((from, n) => from + (place - low) * (FOR[low + 1][n] - from)), 255 * Math.min(0.95, 2 * strength)];
    };
    const tables = {};
    const table = (kind) => (tables[kind] ??= Array.from({ length: 511 }, (_, i) => colour((i - 255) / 255, kind)));

    // Paints a grid: {rows, columns, values: rows * columns numbers from -127 to 127}. kind: "for" or "signed".
    // The canvas gets the grid's shape and is otherwise clear; lay it over the part of a picture, or of a video, that
    // the network saw (CSS does that for ".seen > canvas.heat", and greys and dims what has the class "picture").
    const paint = (canvas, { rows, columns, values }, kind = "for") => {
        const scale = SIDE / Math.max(rows, columns);
        const width = (canvas.width = Math.round(columns * scale)), height = (canvas.height = Math.round(rows * scale));
        const context = canvas.getContext("2d"), pixels = context.createImageData(width, height), colours = table(kind);
        enlarge(values, rows, columns, height, width).forEach((value, i) => {
            pixels.data.set(colours[Math.round(Math.max(-255, Math.min(255, (value * 255) / 127))) + 255], 4 * i);
        });
        context.putImageData(pixels, 0, 0);
    };

    // Shows a stage as its data say: data-heat, the classes' grids and words; data-index, the class, or "" for none.
    const show = (stage) => {
        const { rows, columns, maps } = JSON.parse(stage.dataset.heat), map = maps[stage.dataset.index];
        const canvas = stage.querySelector("canvas.heat"), kind = document.documentElement.dataset.kind;
        canvas.hidden = !map;
        canvas.dataset.index = stage.dataset.index;
        canvas.dataset.kind = kind;
        stage.querySelector("figcaption").textContent = map?.words ?? "";
        if (map) paint(canvas, { rows, columns, values: decode(map.grid) }, kind);
    };

    // The legend is painted by the same colours, from the weakest to the strongest.
    const legend = (canvas, kind) => {
        const columns = 64, lowest = kind === "signed" ? -127 : 0;
        const values = Array.from({ length: columns }, (_, i) => lowest + ((127 - lowest) * i) / (columns - 1));
        paint(canvas, { rows: 1, columns, values }, kind);
    };

    return { show, legend };
})();
