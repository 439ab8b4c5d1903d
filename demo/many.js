// Many pictures: what is chosen or dropped, before Gradio uploads it, and the table's sorting.
(() => {
    const LIMIT = 20 * 2 ** 20; // bytes, as in guard.py; a larger file would be refused with all the others
    const given = new WeakSet();

    // A file keeps the folders it lies in, and one that is too large becomes a note of its size (see many.py).
    const pass = (files, input) => {
        const transfer = new DataTransfer();
        for (const file of files) {
            const name = (file.webkitRelativePath || file.name).replaceAll("/", " › ");
            const content = file.size > LIMIT ? `convmixer: too large: ${file.size}` : file;
            transfer.items.add(new File([content], name, { type: file.type }));
        }
        input.files = transfer.files;
        const event = new Event("change", { bubbles: true });
        given.add(event);
        input.dispatchEvent(event);
    };
    document.addEventListener("change", (event) => {
        const isOurs = event.target.matches?.('#files input[type="file"], #tab-batch input[webkitdirectory]');
        if (!isOurs || given.has(event) || !event.target.files.length) return;
        event.stopImmediatePropagation();
        pass([...event.target.files], event.target);
    }, true);
    document.addEventListener("drop", (event) => {
        const input = event.target.closest?.("#files")?.querySelector('input[type="file"]');
        if (!input || !event.dataTransfer.files.length) return;
        event.preventDefault();
        event.stopImmediatePropagation();
        pass([...event.dataTransfer.files], input);
    }, true);

    document.addEventListener("click", (event) => {
        const row = event.target.closest("#batch button[data-file]");
        if (row) document.querySelector('#tabs [role="tab"]').click(); // Answer
        const button = event.target.closest("#batch th button[data-column]");
        if (!button) return;
        const { column } = button.dataset, head = button.closest("th"), body = button.closest("table").tBodies[0];
        const descends = head.ariaSort === "ascending" || (!head.ariaSort && column % 2 === 0 && column > 0); // best scores first
        for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
        head.ariaSort = descends ? "descending" : "ascending";
        const value = (line) => line.cells[column]?.dataset.sort ?? line.cells[0].textContent;
        const lines = [...body.rows].sort((a, b) => value(a).localeCompare(value(b), undefined, { numeric: true }));
        if (descends) lines.reverse();
        const isBroken = (line) => line.classList.contains("broken");
        body.append(...lines.filter((line) => !isBroken(line)), ...lines.filter(isBroken)); // these have nothing to sort by
    });
})();
