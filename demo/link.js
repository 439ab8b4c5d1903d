// The address in the browser says what is shown: example, model, tab, class. So a reload, back and forward keep it, and
// a link shows it to others.
const link = (() => {
    const find = (selector) => document.querySelector(selector);
    const bars = () => [...document.querySelectorAll("#answer .bar")];
    const label = (bar) => bar?.querySelector(".label").textContent;
    const examples = () => [...document.querySelectorAll("#examples button[data-name]")].map((each) => each.dataset.name);
    let first, isRestoring = false, timer;

    const now = () => {
        const picture = find("#stage .picture").alt, pressed = bars().find((bar) => bar.getAttribute("aria-pressed") === "true");
        const model = find("#answer .answer").getAttribute("aria-label").replace("Answer of ", "");
        return {
            picture: examples().includes(picture) ? picture : null, // others have not got a visitor's own
            model: model.startsWith("yours: ") ? null : model,
            tab: document.documentElement.dataset.tab,
            class: pressed && pressed !== bars()[0] ? label(pressed) : null,
        };
    };
    const write = () => {
        if (isRestoring || find("#stage :is(.moving, .paper)")) return;
        const url = new URL(location.href), shown = now(), other = [];
        if (shown.picture) sessionStorage.removeItem("own");
        else sessionStorage.setItem("own", find("#stage .picture").alt);
        if (shown.picture !== first.picture) find("#lost")?.remove();
        for (const [name, value] of Object.entries(shown)) {
            if (url.searchParams.get(name) !== (value === first[name] ? null : value)) other.push(name);
            if (value === null || value === first[name]) url.searchParams.delete(name);
            else url.searchParams.set(name, value);
        }
        if (url.href === location.href) return;
        history[other.every((name) => name === "class") ? "replaceState" : "pushState"](history.state, "", url);
    };
    const until = async (test) => {
        for (let i = 0; i < 300 && !test(); i++) await new Promise((done) => setTimeout(done, 50));
    };
    const restore = async () => {
        isRestoring = true;
        const asked = new URLSearchParams(location.search), wanted = {};
        for (const name of Object.keys(first)) wanted[name] = asked.get(name) ?? first[name];
        const isThere = () => ["picture", "model"].every((name) => now()[name] === wanted[name]);
        if (!isThere()) {
            await until(() => window.restoreView);
            window.restoreView({ name: wanted.picture, model: wanted.model });
            await until(() => isThere() || find("#problem .problem"));
        }
        const tab = [...document.querySelectorAll('#tabs [role="tab"]')].find((each) => each.textContent.trim() === wanted.tab);
        if (wanted.tab !== now().tab) tab?.click();
        const bar = bars().find((each) => label(each) === wanted.class);
        if (bar && bar.getAttribute("aria-pressed") !== "true") bar.click();
        isRestoring = false;
    };

    // A visitor's own picture is gone after a reload, and an example in its place: that is said.
    const tellWhatIsLost = () => {
        const name = sessionStorage.getItem("own");
        if (!name) return;
        sessionStorage.removeItem("own");
        const line = Object.assign(document.createElement("section"), { id: "lost", className: "problem", role: "alert" });
        line.append(Object.assign(document.createElement("p"), { textContent: `${name} went with the reload; choose it again.` }));
        find("#problem").before(line);
    };

    const connect = () => {
        first = now();
        tellWhatIsLost();
        const later = () => {
            clearTimeout(timer);
            timer = setTimeout(write, 150);
        };
        new MutationObserver(later).observe(document.documentElement, {
            subtree: true, childList: true, attributeFilter: ["aria-pressed", "data-tab", "alt"],
        });
        addEventListener("popstate", restore);
        if (location.search) restore();
    };
    return { connect };
})();
