// Answers while something moves: the camera, or a brush over the picture. One small frame at a time goes to the server
// (live.py), and what comes back changes the bars and the heat map that are there.
const live = (() => {
    const SIDE = 320; // pixels of a frame's longer side: it is what a slow link has to carry
    const BRUSH = 0.07; // radius, of the picture's longer side
    const find = (selector) => document.querySelector(selector);
    const frame = document.createElement("canvas");
    let video = null, shownBefore, give, before = null, isFrozen = false, isBusy = false, isStale = false;

    const paper = () => find("#stage .paper");
    const model = () => find("#model input").value.split(" · ")[0];
    const size = (source) => [source.videoWidth || source.naturalWidth, source.videoHeight || source.naturalHeight];

    const draw = (canvas, longer) => {
        const source = video ?? find("#stage .picture"), [width, height] = size(source);
        const scale = Math.min(1, longer / Math.max(width, height));
        canvas.width = Math.max(1, Math.round(width * scale));
        canvas.height = Math.max(1, Math.round(height * scale));
        const context = canvas.getContext("2d");
        for (const layer of [source, paper()]) if (layer) context.drawImage(layer, 0, 0, canvas.width, canvas.height);
        return new Promise((done) => canvas.toBlob(done, "image/jpeg", 0.85));
    };

    // Puts a new answer in the place of the one that is there, element by element: a press must not miss what it aims at.
    const show = ({ stage, bars }) => {
        const parse = (text) => Object.assign(document.createElement("template"), { innerHTML: text }).content.firstElementChild;
        const [fresh, answer] = [parse(stage), parse(bars)], old = find("#stage .stage"), there = find("#answer .answer");
        const best = there.querySelector(".bar")?.dataset.index, { index } = old.dataset;
        const keeps = index === "" || (index !== best && index in JSON.parse(fresh.dataset.heat).maps);
        old.dataset.heat = fresh.dataset.heat;
        old.dataset.index = keeps ? index : fresh.dataset.index;
        old.style.cssText = fresh.style.cssText;
        const [seen, newSeen] = [old, fresh].map((each) => each.querySelector(".seen"));
        seen.style.cssText = newSeen.style.cssText;
        seen.className = newSeen.className;
        heat.show(old);
        const status = there.querySelector('[role="status"]');
        status.ariaLive = "off"; // ten times a second would be too much to listen to
        status.replaceChildren(...answer.querySelector('[role="status"]').childNodes);
        const [now, next] = [there, answer].map((each) => [...each.querySelectorAll(".bars > li")]);
        if (now.length !== next.length) there.querySelector(".bars").replaceChildren(...next);
        else now.forEach((item, n) => {
            const [bar, other] = [item, next[n]].map((each) => each.querySelector(".bar"));
            for (const name of ["data-index", "style", "title"]) bar.setAttribute(name, other.getAttribute(name));
            for (const part of [".label", ".score"]) bar.querySelector(part).textContent = other.querySelector(part).textContent;
        });
        for (const bar of there.querySelectorAll(".bar"))
            bar.setAttribute("aria-pressed", bar.dataset.index === old.dataset.index);
    };

    const tell = (text) => (find("#camera-button .trouble").textContent = text);

    const ask = async () => {
        const body = await draw(frame, SIDE);
        const address = new URL(`live?model=${encodeURIComponent(model())}`, document.baseURI);
        const answer = await fetch(address, { method: "POST", body }).then((response) => response.json());
        if (answer.problem) throw new Error(answer.problem);
        if (video ? video.isConnected : paper()) show(answer); // else another picture has come meanwhile
    };

    // The camera.

    const WHY = {
        NotFoundError: "The browser finds no camera on this device; choose a picture instead.",
        NotAllowedError: "The browser does not let this page use the camera; allow it beside the address, and press again.",
        NotReadableError: "Another program is using the camera; end it there, and press again.",
    };
    const insecure = () =>
        "Browsers give a page the camera only over HTTPS or on the machine that runs it: take a photo and choose it as a " +
        `picture, or open http://127.0.0.1:${location.port || 80} on that machine.`;

    const stop = () => {
        for (const track of video?.srcObject?.getTracks() ?? []) track.stop();
        video?.remove();
        video = null;
        const button = find("#camera-button button");
        button.textContent = "Use the camera";
        button.setAttribute("aria-pressed", false);
    };

    const attach = () => {
        shownBefore = find("#stage .picture").alt;
        find("#stage .frame").insertBefore(video, find("#stage .seen"));
    };
    // What the server puts there takes the video away: another picture, or the same one with another model.
    const isReplaced = () => {
        if (!video.isConnected && find("#stage .picture").alt === shownBefore) {
            attach();
            video.play(); // browsers pause one that is taken away
        }
        return !video.isConnected;
    };

    const start = async () => {
        if (!navigator.mediaDevices) return tell(insecure());
        let stream;
        try {
            stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
        } catch (error) {
            return tell(WHY[error.name] ?? `The camera does not start (${error.name}); choose a picture instead.`);
        }
        video = Object.assign(document.createElement("video"), { muted: true, playsInline: true, srcObject: stream });
        video.className = "moving";
        isFrozen = false;
        attach();
        const button = find("#camera-button button");
        button.textContent = "Freeze";
        button.setAttribute("aria-pressed", true);
        try {
            await video.play();
            while (video && !isFrozen) {
                if (isReplaced()) return stop();
                await ask();
                await new Promise(requestAnimationFrame); // none while the page is hidden
            }
        } catch (error) {
            if (video) tell(error.name === "TypeError" ? "The demo does not answer; is it still running?" : error.message);
            stop();
        }
    };

    // The frame becomes the picture, as if it had been uploaded.
    const freeze = async () => {
        isFrozen = true;
        video.pause();
        const blob = await draw(document.createElement("canvas"), 1280);
        give([new File([blob], "camera.jpg", { type: "image/jpeg" })]);
        for (const track of video.srcObject.getTracks()) track.stop();
        const end = setInterval(() => {
            if (video?.isConnected) return;
            clearInterval(end);
            if (video) stop();
        }, 50);
    };

    // The brush: what is under it is grey, and counts no more.

    const isPainting = () => find("#paint")?.getAttribute("aria-pressed") === "true";
    const askAgain = async () => {
        isStale = true;
        if (isBusy || video) return; // the camera asks by itself
        isBusy = true;
        try {
            while (isStale && paper()) {
                isStale = false;
                await ask();
            }
        } catch (error) {
            tell(error.name === "TypeError" ? "The demo does not answer; is it still running?" : error.message);
        }
        isBusy = false;
    };
    const newPaper = () => {
        before = { stage: find("#stage .stage").outerHTML, bars: find("#answer .answer").outerHTML };
        const [width, height] = size(video ?? find("#stage .picture")), scale = 640 / Math.max(width, height);
        const canvas = Object.assign(document.createElement("canvas"), {
            className: "paper", width: Math.max(1, width * scale), height: Math.max(1, height * scale),
        });
        find("#stage .frame").append(canvas);
        return canvas;
    };
    const paint = (event) => {
        const canvas = paper() ?? newPaper(), box = canvas.getBoundingClientRect(), context = canvas.getContext("2d");
        context.fillStyle = "#808080";
        const moves = event.getCoalescedEvents?.() ?? []; // none when it is pressed
        for (const each of moves.length ? moves : [event]) {
            context.beginPath();
            const [x, y] = [(each.clientX - box.left) / box.width, (each.clientY - box.top) / box.height];
            context.arc(x * canvas.width, y * canvas.height, BRUSH * Math.max(canvas.width, canvas.height), 0, 7);
            context.fill();
        }
        askAgain();
    };

    // give: what page.js does with files that come in.
    const connect = (giveFiles) => {
        give = giveFiles;
        document.addEventListener("click", (event) => {
            if (event.target.closest("#camera-button button")) {
                tell("");
                if (video) freeze();
                else start();
            }
            const button = event.target.closest("#paint");
            if (!button) return;
            const on = !isPainting();
            button.setAttribute("aria-pressed", on);
            document.documentElement.classList.toggle("painting", on);
            if (on || !paper()) return;
            paper().remove();
            if (!video) show(before);
        });
        for (const name of ["pointerdown", "pointermove"])
            document.addEventListener(name, (event) => {
                if (!isPainting() || !event.buttons || !event.target.closest("#stage .frame")) return;
                event.preventDefault();
                paint(event);
            });
        document.addEventListener("keydown", (event) => {
            if (event.key === "Escape" && video) stop();
        });
    };

    return { connect };
})();
