// What the page does without its server. Gradio calls this once, when the page has loaded.
() => {
    const root = document.documentElement;

    // Heat maps are painted as stages come, and a comparison shows the main stage's picture.
    let pressedBlock; // which keeps the focus when its view has been answered anew
    const stages = () => document.querySelectorAll(".stage");
    const paint = () => {
        const fresh = [...stages()].filter((stage) => !stage.dataset.painted);
        for (const stage of fresh) {
            stage.dataset.painted = true;
            heat.show(stage);
        }
        const picture = fresh.length && document.querySelector("#stage .picture")?.src;
        if (picture) for (const other of document.querySelectorAll("#compare .picture")) other.src = picture;
        if (pressedBlock && document.activeElement === document.body) pressedBlock = document.querySelector(pressedBlock)?.focus();
    };
    const setKind = (kind) => {
        root.dataset.kind = kind;
        stages().forEach(heat.show);
        const legend = document.querySelector(".legend canvas");
        if (legend) heat.legend(legend, kind);
    };
    setKind("for");
    paint();
    new MutationObserver(paint).observe(document.body, { subtree: true, childList: true });

    // A bar shows the heat map of its class over the picture of the same view; pressed again, the plain picture.
    document.addEventListener("click", (event) => {
        const bar = event.target.closest(".bar");
        if (!bar) return;
        const { view, index } = bar.dataset;
        const on = bar.getAttribute("aria-pressed") !== "true";
        for (const other of document.querySelectorAll(`.bar[data-view="${view}"]`))
            other.setAttribute("aria-pressed", on && other === bar);
        for (const stage of document.querySelectorAll(`.stage[data-view="${view}"]`)) {
            stage.dataset.index = on ? index : "";
            heat.show(stage);
        }
    });

    // A place in the picture or in a block's map is marked in all of them: a square of one patch.
    document.addEventListener("pointermove", (event) => {
        const columns = document.querySelector(".blocks")?.dataset.columns;
        const map = root.dataset.tab === "Look inside" && columns && event.target.closest(".map, #stage .seen");
        root.classList.toggle("marking", !!map);
        if (!map) return;
        const box = map.getBoundingClientRect();
        const patch = (part) => Math.min(columns - 1, Math.max(0, Math.floor(part * columns))) / columns;
        root.style.setProperty("--x", patch((event.clientX - box.left) / box.width));
        root.style.setProperty("--y", patch((event.clientY - box.top) / box.height));
        root.style.setProperty("--patch", 1 / columns);
    });
    document.addEventListener("click", (event) => {
        const block = event.target.closest(".blocks button");
        if (block) pressedBlock = `.blocks [data-name="${block.dataset.name}"]`;
    });

    // A contact sheet fills the window, until the next press or Escape.
    const enlarged = () => document.querySelector('.sheet button[aria-pressed="true"]');
    document.addEventListener("click", (event) => {
        const open = enlarged(), sheet = event.target.closest(".sheet button");
        open?.setAttribute("aria-pressed", false);
        if (sheet && sheet !== open) sheet.setAttribute("aria-pressed", true);
    });
    document.addEventListener("keydown", (event) => {
        if (event.key === "Escape") enlarged()?.setAttribute("aria-pressed", false);
    });

    document.addEventListener("input", (event) => {
        if (event.target.id === "opacity") root.style.setProperty("--heat", event.target.value / 100);
        if (event.target.name === "kind") setKind(event.target.value);
    });

    // The layout follows the tab, however it was chosen.
    const follow = () => {
        const tab = document.querySelector('#tabs [role="tab"][aria-selected="true"]');
        if (tab) root.dataset.tab = tab.textContent.trim();
    };
    new MutationObserver(follow).observe(document.querySelector("#tabs"), {
        subtree: true, childList: true, attributeFilter: ["aria-selected"],
    });
    follow();

    // On a phone one button opens the camera, the other the photographs.
    for (const id of ["photo", "source"]) {
        const input = document.querySelector(`#${id} input[type="file"]`);
        input.accept = "image/*,.heic,.heif,.avif";
        if (id === "photo") input.setAttribute("capture", "environment");
    }

    // A picture can be pasted anywhere, or dropped anywhere while its button is in view. Whatever it is goes to the server,
    // which says best why it cannot read something.
    const give = (files) => {
        const field = document.querySelector("#source");
        if (!files?.length || !field?.offsetParent) return false;
        const input = field.querySelector('input[type="file"]'), transfer = new DataTransfer();
        transfer.items.add(files[0]);
        input.files = transfer.files;
        input.dispatchEvent(new Event("change", { bubbles: true }));
        return true;
    };
    live.connect(give);
    link.connect();
    document.addEventListener("paste", (event) => {
        if (give(event.clipboardData?.files)) event.preventDefault();
    });
    const isElsewhere = (event) => event.target.closest?.("#files, #folder, #checkpoint");
    document.addEventListener("dragover", (event) => {
        root.classList.add("dropping");
        if (!isElsewhere(event)) event.preventDefault();
    });
    document.addEventListener("dragleave", (event) => {
        if (!event.relatedTarget) root.classList.remove("dropping");
    });
    document.addEventListener("drop", (event) => {
        root.classList.remove("dropping");
        if (isElsewhere(event)) return;
        event.preventDefault(); // the browser would leave the page for the picture
        event.stopPropagation();
        give([...event.dataTransfer.files]);
    }, true);
}
