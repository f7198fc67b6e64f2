(() => {
  const COLOURS = {white: "#15181c", "#222222": "#e6e6e6", "#e4e4e4": "#3a3f45", "#555555": "#b0b0b0",
    "#0072B2": "#6b7cff"};
  const wish = matchMedia("(prefers-color-scheme: dark)");
  const all = selector => [...document.querySelectorAll(selector)];
  const paint = (text, dark) => JSON.parse(dark
    ? text.replace(/"(white|#222222|#e4e4e4|#555555|#0072B2)"/g, (found, colour) => `"${COLOURS[colour]}"`)
    : text);

  // The library, the figures and the largest tables are compressed: the page would be three times as large with them
  // as text, and slower to open.
  const unpack = async packed => {
    const bytes = Uint8Array.fromBase64?.(packed) ?? Uint8Array.from(atob(packed), letter => letter.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"))).text();
  };
  const take = id => {
    const script = document.getElementById(id);
    script.remove();
    return script.textContent;
  };
  const packed = take("packed-figures").split("\n"), texts = [];
  const placeOf = box => box.id.replace("figure-", "") - 1;
  const prepare = async i => { texts[i] ??= await unpack(packed[i]); };
  // Paper cannot wait for a figure to be unpacked.
  const prepareAll = async () => {
    await Promise.all(plots.map(box => prepare(placeOf(box))));
    document.body.classList.add("prepared");
  };
  // A legend of several lines makes the figure higher, not its panels lower.
  const LETTER = 7.5, MARK = 45, LINE = 20;
  const read = (box, dark) => {
    const figure = paint(texts[placeOf(box)], dark);
    const names = figure.data.filter(each => each.name && each.showlegend !== false).map(each => each.name);
    const width = names.reduce((sum, name) => sum + MARK + LETTER * name.length, 0);
    const lines = Math.ceil(width / Math.max(200, (box.clientWidth || 900) - 90));
    figure.layout.height += LINE * Math.max(0, lines - 1);
    box.style.height = figure.layout.height + "px";
    if (document.body.classList.contains("printed")) figure.layout.width = box.clientWidth;
    return figure;
  };

  // Figures near the window are drawn first, then the other figures one at a time, so that a page of a hundred
  // figures opens as fast as a page of three. Hidden figures wait until they are shown: before that they have
  // no width.
  const plots = all(".plot"), waiting = new Set(plots);
  for (const box of plots) {
    box.style.minWidth = box.dataset.width + "px";
    box.style.height = box.dataset.height + "px";
    box.setAttribute("role", "img");
    box.setAttribute("aria-label", box.textContent.trim());
  }
  const isShown = box => box.offsetParent, isDrawn = box => box.classList.contains("js-plotly-plot");
  const drawNow = (box, dark = wish.matches) => {
    waiting.delete(box);
    const {data, layout} = read(box, dark);
    if (!isDrawn(box)) box.textContent = "";
    Plotly.react(box, data, layout, {responsive: true, displaylogo: false, displayModeBar: false});
  };
  const draw = async box => {
    waiting.delete(box);
    await prepare(placeOf(box));
    drawNow(box);
  };
  const redraw = dark => plots.filter(isDrawn).forEach(box => drawNow(box, dark));
  const start = library => {
    const script = document.createElement("script");
    script.textContent = library;
    document.head.append(script);
    const watch = new IntersectionObserver(found => found.forEach(({isIntersecting, target}) => {
      if (isIntersecting && waiting.has(target)) draw(target);
    }), {rootMargin: "400px"});
    plots.forEach(box => watch.observe(box));
    const next = async () => {
      const box = [...waiting].find(isShown);
      if (box) { await draw(box); setTimeout(next, 20); } else prepareAll();
    };
    setTimeout(next, 200);
    wish.addEventListener("change", () => redraw());
  };
  unpack(take("packed-library")).then(start);
  // Paper is white and has no tabs.
  addEventListener("beforeprint", () => {
    document.body.classList.add("printed");
    all("details.warn").forEach(each => { each.open = true; });
    redraw(false);
    if (window.Plotly) plots.filter(box => isShown(box) && texts[placeOf(box)]).forEach(box => drawNow(box, false));
  });
  addEventListener("afterprint", () => {
    document.body.classList.remove("printed");
    redraw();
  });

  // Each figure and each table can be saved: buttons that only a script can serve are made by the script.
  const title = document.title.replace("soluscope: ", "");
  const save = (url, ending, box) => {
    const part = box.closest("section"), at = 1 + [...part.querySelectorAll(".box")].indexOf(box);
    const heading = part.querySelector("h2:not(.first)")?.textContent ?? "answer";
    const link = document.createElement("a");
    link.href = url;
    link.download = [title, heading, at].join(" ").replace(/[^A-Za-z0-9.]+/g, "-") + ending;
    link.click();
  };
  const cell = of => {
    const words = [...of.querySelectorAll("[aria-label]")].map(each => each.getAttribute("aria-label"));
    const text = words.join("; ") || of.innerText.trim().replace(/\s*\n\s*/g, "; ");
    // A spreadsheet would run a text that starts like a formula.
    const safe = /^[=@\t]|^[+-](?![\d.])/.test(text) ? "'" + text : text;
    return `"${safe.replace(/"/g, '""')}"`;
  };
  const addButton = box => {
    const plot = box.querySelector(".plot"), button = document.createElement("button");
    button.className = "save";
    button.textContent = plot ? "SVG" : "CSV";
    button.setAttribute("aria-label", plot ? "Save this figure as SVG" : "Save this table as CSV");
    button.addEventListener("click", async () => {
      if (plot) {
        await prepare(placeOf(plot));
        const {data, layout} = read(plot, false);
        const width = plot.clientWidth || 900, {height} = layout;
        save(await Plotly.toImage({data, layout}, {format: "svg", width, height}), ".svg", box);
      } else {
        const rows = [...box.querySelectorAll("tr")].map(row => [...row.cells].map(cell).join(","));
        const url = URL.createObjectURL(new Blob(["\ufeff" + rows.join("\r\n") + "\r\n"], {type: "text/csv"}));
        save(url, ".csv", box);
        setTimeout(() => URL.revokeObjectURL(url), 1000);
      }
    });
    box.before(button);
  };
  all(".box").forEach(addButton);
  for (const script of all("details > .packed")) {
    const fold = script.parentElement;
    fold.addEventListener("toggle", async () => {
      script.outerHTML = await unpack(script.textContent);
      fold.querySelectorAll(".box").forEach(addButton);
    }, {once: true});
  }

  // The links of a navigation become tabs: one part is shown at a time. Arrow keys move between the tabs.
  const groups = all("nav.tabs").map(nav => {
    const links = [...nav.querySelectorAll("a")];
    const panels = links.map(link => document.getElementById(link.hash.slice(1)));
    nav.setAttribute("role", "tablist");
    links.forEach((link, i) => {
      link.id = panels[i].id + "-tab";
      link.setAttribute("role", "tab");
      link.setAttribute("aria-controls", panels[i].id);
      panels[i].setAttribute("role", "tabpanel");
      panels[i].setAttribute("aria-labelledby", link.id);
    });
    nav.addEventListener("keydown", event => {
      const at = links.indexOf(document.activeElement), last = links.length - 1;
      const to = {ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last}[event.key];
      if (at < 0 || to === undefined) return;
      event.preventDefault();
      const link = links[Math.max(0, Math.min(last, to))];
      link.click();
      link.focus();
    });
    const show = i => links.forEach((link, k) => {
      link.setAttribute("aria-selected", String(k === i));
      link.tabIndex = k === i ? 0 : -1;
      panels[k].hidden = k !== i;
    });
    show(0);
    return {panels, show};
  });
  const reveal = () => {
    const target = document.getElementById(location.hash.slice(1));
    if (!target) return;
    for (const {panels, show} of groups) {
      const i = panels.findIndex(panel => panel.contains(target));
      if (i >= 0) show(i);
    }
    plots.forEach(box => { if (isDrawn(box) && isShown(box)) Plotly.Plots.resize(box); });
    if (target.matches("[role=tabpanel]")) scrollTo(0, 0); else target.scrollIntoView();
  };
  addEventListener("hashchange", reveal);
  addEventListener("load", reveal);  // the browser has moved to the part by then
  reveal();
})();
