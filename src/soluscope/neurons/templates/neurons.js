(() => {
  "use strict";
  const $ = id => document.getElementById(id);
  const unpack = async packed => {
    const bytes = Uint8Array.from(atob(packed), letter => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
    return JSON.parse(await new Response(stream).text());
  };

  // A page opened from disk may not fetch files, but it may load scripts. Each data file is a script that hands over
  // one compressed text, which is data: it is unpacked, and never run.
  const waiting = new Map(), loaded = new Map();
  window.soluscopeNeurons = (name, packed) => waiting.get(name)?.(packed);
  const load = name => {
    if (!loaded.has(name)) {
      loaded.set(name, new Promise((resolve, reject) => {
        const script = document.createElement("script");
        waiting.set(name, packed => resolve(unpack(packed)));
        script.onerror = () => reject(new Error(`data/${name}.js is missing: make the site again`));
        script.src = `data/${name}.js`;
        document.head.append(script);
      }));
    }
    return loaded.get(name);
  };

  // Elements are built from text nodes only, so that a token can never become markup.
  const element = (tag, options = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(options)) {
      if (key === "text") made.textContent = value;
      else if (key === "on") Object.entries(value).forEach(([type, act]) => made.addEventListener(type, act));
      else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
  };
  const shown = (value, digits = 2) => {
    if (value === null || value === undefined) return "–";
    const size = Math.abs(value);
    return size !== 0 && (size < .01 || size >= 10000) ? value.toExponential(1) : value.toFixed(size >= 100 ? 0 : digits);
  };

  const COLUMNS = [
    ["f1_mid", "F1 before", "F1 of the best rule before the norm"],
    ["f1_post", "F1 after", "F1 of the best rule after the norm"],
    ["drop", "drop", "share of active tokens that fit the rule: before minus after the norm"],
    ["kurtosis_mid", "kurtosis before", "kurtosis before the norm; 3 for a normal distribution"],
    ["kurtosis_post", "kurtosis after", "kurtosis after the norm"],
    ["share_post", "share", "share of tokens in the upper five ranges after the norm"],
    ["effect", "effect", "mean |change of loss| without the neuron at its own tokens, nats"],
    ["D", "D", "mean |effect minus effect under one gain|, nats"],
  ];
  // A column's least value; the best of two columns counts. An empty field leaves nothing out.
  const LEAST = {least: ["f1_mid", "f1_post"], drop: ["drop"], effect: ["effect"], kurtosis: ["kurtosis_mid", "kurtosis_post"]};
  const CONTROLS = ["run", "sort", "order", "query", ...Object.keys(LEAST), "beside"];
  const SORTS = [...COLUMNS, ["change", "change of F1", "F1 after minus F1 before"], ["neuron", "number", ""]];
  const STAGES = {pre: "before the nonlinearity (pre)", mid: "before the norm (mid)", post: "after the norm (post)"};
  const PAGE = 50;
  const state = {run: "", sort: "f1_mid", order: "down", query: "", least: "", drop: "", effect: "", kurtosis: "", beside: "",
    neuron: null, stage: "post", page: 0};
  let manifest, runs = [], list = [];

  const value = (row, key) => key === "change" ? (row.f1_post ?? 0) - (row.f1_mid ?? 0) : row[key];
  const ordered = rows => {
    const sign = state.order === "down" ? -1 : 1;
    return rows.sort((a, b) => {
      const x = value(a, state.sort), y = value(b, state.sort);
      if (x === null || y === null) return (x === null) - (y === null) || a.neuron - b.neuron;
      return sign * (x - y) || a.neuron - b.neuron;
    });
  };
  const chosenOf = key => {
    const words = state.query.toLowerCase();
    const bounds = Object.entries(LEAST).filter(([name]) => state[name] !== "").map(([name, keys]) => [keys, Number(state[name])]);
    return ordered(runs.filter(run => !key || run.key === key).flatMap(run => run.rows).filter(row =>
      bounds.every(([keys, least]) => keys.some(each => row[each] !== null && row[each] >= least))
      && (!words || row.words.includes(words))));
  };

  const readHash = () => {
    const given = new URLSearchParams(location.hash.slice(1));
    const number = given.get("neuron");
    if (given.has("of") && !given.has("run")) state.run = given.get("of");  // a short link shows the neuron in its list
    for (const key of [...CONTROLS, "stage"]) state[key] = given.get(key) ?? state[key];
    for (const key of Object.keys(LEAST)) if (!Number.isFinite(Number(state[key]))) state[key] = "";
    state.neuron = number === null ? state.neuron : {run: given.get("of") ?? state.run, neuron: Number(number)};
    if (!SORTS.some(([key]) => key === state.sort)) state.sort = "f1_mid";
    if (!(state.stage in STAGES)) state.stage = "post";
    for (const key of ["run", "beside"]) if (!runs.some(run => run.key === state[key])) state[key] = "";
  };
  const writeHash = () => {
    const given = new URLSearchParams();
    given.set("run", state.run);  // also if it is empty: all models
    for (const key of [...CONTROLS, "stage"]) if (state[key]) given.set(key, state[key]);
    if (state.neuron) { given.set("of", state.neuron.run); given.set("neuron", state.neuron.neuron); }
    history.replaceState(null, "", "#" + given);
  };

  const sortBy = key => {
    state.order = state.sort === key && state.order === "down" ? "up" : "down";
    state.sort = key;
    state.page = 0;
    showControls();
    drawList();
    drawCards();
    [...$("table").tHead.querySelectorAll("[aria-sort] button")].forEach(each => each.focus());
  };
  const reveal = () => {
    const at = list.findIndex(isChosen);
    if (at >= 0) state.page = Math.floor(at / PAGE);
  };
  const isChosen = row => state.neuron !== null && row.run.key === state.neuron.run && row.neuron === state.neuron.neuron;

  const drawList = () => {
    list = chosenOf(state.run);
    const pages = Math.max(1, Math.ceil(list.length / PAGE));
    state.page = Math.min(state.page, pages - 1);
    const all = !state.run;
    const heads = [...(all ? [["", "model", ""]] : []), ["neuron", "neuron", ""], ["", "rule before", "best rule before the norm"],
      ["", "rule after", "best rule after the norm"], ...COLUMNS];
    $("table").tHead.replaceChildren(element("tr", {}, ...heads.map(([key, name, title]) => {
      const order = state.order === "down" ? "descending" : "ascending", sorted = key && key === state.sort;
      const head = element("th", {scope: "col", title, ...(sorted ? {"aria-sort": order} : {})});
      head.append(key ? element("button", {type: "button", text: name, on: {click: () => sortBy(key)}}) : name);
      return head;
    })));
    const rows = list.slice(state.page * PAGE, (state.page + 1) * PAGE);
    $("table").tBodies[0].replaceChildren(...rows.map(row => {
      const link = element("a", {href: "#", text: row.neuron, on: {click: event => { event.preventDefault(); choose(row); }}});
      return element("tr", {...(isChosen(row) ? {"aria-current": "true"} : {}), on: {click: () => choose(row)}},
        ...(all ? [element("td", {class: "rule", text: row.run.label})] : []),
        element("th", {scope: "row"}, link),
        element("td", {class: "rule", text: row.rule_mid || "–"}), element("td", {class: "rule", text: row.rule_post || "–"}),
        ...COLUMNS.map(([key]) => element("td", {text: shown(row[key])})));
    }));
    $("page").textContent = `page ${state.page + 1} of ${pages}`;
    $("earlier").disabled = state.page === 0;
    $("later").disabled = state.page >= pages - 1;
    $("status").textContent = `${list.length.toLocaleString("en")} neurons match.`;
  };

  const colour = (part, dark) => {
    const share = Math.min(1, Math.abs(part));
    if (share < .04) return "";
    return part > 0 ? `rgba(213, 94, 0, ${(share * (dark ? .75 : .6)).toFixed(2)})` : `rgba(0, 114, 178, ${(share * .55).toFixed(2)})`;
  };
  const passage = (example, scale, words) => {
    const box = element("span", {class: "passage", dir: "auto"});
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    example.tokens.forEach((token, i) => {
      const part = example.codes[i] / 127;
      const span = element("span", {text: words[token], title: `${shown(part * scale, 3)}`});
      span.style.background = colour(part, dark);
      if (i === example.peak) span.className = "peak";
      box.append(span);
    });
    return box;
  };
  // Only a server can run the model: the page that it sends has the address of its editor.
  const editor = (row, text, example) => document.body.dataset.editor ? [element("a", {text, href: document.body.dataset.editor + "?"
    + new URLSearchParams({of: row.run.key, neuron: row.neuron, ...(example === undefined ? {} : {example})})})] : [];
  const drawExample = (example, detail, words, documents, edit) => element("div", {class: "example"},
    element("span", {class: "value", text: shown(example.value, 3), title: "activation of the outlined token"}),
    passage(example, detail.scale[example.stage], words),
    element("span", {class: "source", text: [documents[example.document],
      `effect ${shown(example.effect, 3)} nats`, `D ${shown(example.D, 3)}`, `K ${shown(example.k_eff, 1)}`].join(" · ")}, ...edit));

  const histogram = (counts, label) => {
    const space = "http://www.w3.org/2000/svg", most = Math.log1p(Math.max(...counts));
    const drawing = document.createElementNS(space, "svg");
    drawing.setAttribute("class", "histogram");
    drawing.setAttribute("viewBox", `0 0 ${counts.length} 30`);
    drawing.setAttribute("preserveAspectRatio", "none");
    drawing.setAttribute("role", "img");
    drawing.setAttribute("aria-label", `${label}: histogram of the activation. Tokens per range from lowest to highest: `
      + Array.from({length: 10}, (_, i) => counts.slice(i ? manifest.below + 4 * i : 0, manifest.below + 4 * (i + 1))
        .reduce((sum, n) => sum + n, 0)).join(", "));
    counts.forEach((count, i) => {
      const bar = document.createElementNS(space, "rect"), height = most ? 29 * Math.log1p(count) / most : 0;
      for (const [key, of] of Object.entries({x: i + .1, width: .8, y: 30 - height, height})) bar.setAttribute(key, of);
      drawing.append(bar);
    });
    return drawing;
  };
  const table = (caption, heads, lines) => element("div", {class: "wide"}, element("table", {}, element("caption", {class: "unseen", text: caption}),
    element("thead", {}, element("tr", {}, ...heads.map(text => element("th", {scope: "col", text})))),
    element("tbody", {}, ...lines.map(([name, ...cells]) => element("tr", {}, element("th", {scope: "row", text: name}),
      ...cells.map(text => element("td", {text})))))));

  const drawCard = async (row, note) => {
    const run = row.run;
    const [part, words, documents] = await Promise.all([load(`${run.key}-${Math.floor(row.neuron / manifest.group)}`),
      load("vocabulary"), load(`${run.key}-documents`)]);
    const detail = part[row.neuron % manifest.group], stages = run.hasNorm ? ["pre", "mid", "post"] : ["pre", "mid"];
    const stage = stages.includes(state.stage) ? state.stage : "mid";
    const card = element("article", {class: "card"}, element("h2", {text: `Neuron ${row.neuron}, ${run.label}`}),
      element("p", {class: "soft"}, note, ...editor(row, "Try a text").flatMap(link => [" · ", link])));
    for (const side of ["mid", "post"]) {
      const found = detail.rules[side], when = side === "mid" ? "before" : "after";
      card.append(element("p", {class: "best"}, `Best rule ${when} the norm: `, element("b", {text: found.rule || "none"})));
      if (found.rule) card.append(table(`Best rule ${when} the norm`, ["measured", "F1", "precision", "recall"],
        ["mid", "post"].map(at => [at === "mid" ? "before" : "after", ...["f1", "precision", "recall"].map(name => shown(found[`${name}_${at}`]))])));
    }
    card.append(table("Share of the tokens in each range at which the rule before the norm holds",
      ["fits the rule, by range", ...Array.from({length: 10}, (_, i) => i + 1)],
      ["mid", "post"].map(at => [at === "mid" ? "before" : "after", ...detail.rules.mid[`consistent_${at}`].map(each => shown(each))])));
    for (const at of stages.slice(1)) card.append(element("h3", {text: `Activation ${STAGES[at]}, log counts`}), histogram(detail.histogram[at], STAGES[at]));
    card.append(element("details", {}, element("summary", {text: "Statistics, effect by range, logits"}),
      table("Statistics", ["", "before", "after"], [
        ["kurtosis", shown(row.kurtosis_mid), shown(row.kurtosis_post)],
        ["share of tokens", shown(row.share_mid, 4), shown(row.share_post, 4)],
        ["K at its tokens", shown(detail.k_eff_mid, 1), shown(detail.k_eff_post, 1)],
        ["engagement r at its tokens", shown(detail.engagement_mid), shown(detail.engagement_post)],
        ["gamma", "", shown(detail.gamma)], ["effect, nats", "", shown(row.effect, 4)], ["D, nats", "", shown(row.D, 4)]]),
      table("Mean effect of the examples in each range after the norm, nats",
        ["nats, by range", ...Array.from({length: 10}, (_, i) => i + 1)],
        [["effect", ...detail.byRange.effect.map(each => shown(each, 3))], ["D", ...detail.byRange.D.map(each => shown(each, 3))]]),
      element("div", {class: "logits"}, ...["highest", "lowest"].map(side =>
        table(`${side} logits`, [side, "logit"], detail.logits[side].map(([token, logit]) => [words[token], shown(logit)]))))));
    card.append(element("h3", {text: "Examples"}));
    card.append(element("div", {class: "stages", role: "group", "aria-label": "Stage"}, ...stages.map(each => element("button",
      {type: "button", text: STAGES[each], "aria-pressed": String(each === stage), on: {click: () => { state.stage = each; drawCards(); }}}))));
    for (let range = -1; range < 10; range++) {
      const of = range < 0 ? -1 : 9 - range;
      const found = detail.examples.filter(each => each.stage === stage && each.range === of);
      if (!found.length) continue;
      const heading = of < 0 ? "Largest, one of each document" : `Range ${of + 1} of 10`;
      card.append(element("h4", {text: heading}), ...found.map(each => drawExample(each, detail, words, documents,
        editor(row, "edit", detail.examples.indexOf(each)).flatMap(link => [" · ", link]))));
    }
    return card;
  };
  let turn = 0;
  const drawCards = async () => {
    const mine = ++turn;
    writeHash();
    const row = state.neuron && runs.find(run => run.key === state.neuron.run)?.rows[state.neuron.neuron];
    if (!row) { $("cards").replaceChildren(element("p", {class: "soft", text: "Choose a neuron of the list."})); return; }
    const rank = chosenOf(row.run.key).indexOf(row), name = SORTS.find(([key]) => key === state.sort)[1];
    const place = (of, run) => of < 0 ? "not in the list" : `rank ${of + 1} by ${name} in ${run.label}`;
    const cards = [drawCard(row, place(rank, row.run))];
    const other = state.beside && rank >= 0 && chosenOf(state.beside)[rank];
    if (other) cards.push(drawCard(other, place(rank, other.run)));
    try {
      const drawn = await Promise.all(cards);
      if (mine !== turn) return;
      document.querySelector(".split").classList.toggle("two", drawn.length > 1);
      $("cards").replaceChildren(...drawn);
      $("cards").dataset.drawn = `${state.neuron.run}/${state.neuron.neuron}`;
    } catch (error) { $("status").textContent = error.message; }
  };
  const choose = row => {
    state.neuron = {run: row.run.key, neuron: row.neuron};
    drawList();
    drawCards();
  };
  const step = by => {
    const next = list[Math.max(0, Math.min(list.length - 1, list.findIndex(isChosen) + by))];
    if (!next) return;
    state.neuron = {run: next.run.key, neuron: next.neuron};
    reveal();
    choose(next);
    showLine();
  };
  const showLine = () => document.querySelector('#table tr[aria-current="true"]')?.scrollIntoView({block: "nearest"});

  const options = (select, pairs) => select.replaceChildren(...pairs.map(([key, text]) => element("option", {value: key, text})));
  const showControls = () => {
    for (const key of CONTROLS) $(key).value = state[key];
  };
  const start = async () => {
    manifest = await unpack($("manifest").textContent);
    const tables = await Promise.all(manifest.runs.map(run => load(run.key)));
    runs = manifest.runs.map((run, i) => {
      const columns = tables[i];
      const rows = columns.neuron.map((neuron, at) => {
        const row = Object.fromEntries(Object.keys(columns).map(key => [key, columns[key][at]]));
        return Object.assign(row, {words: row.words.toLowerCase()});
      });
      const made = {...run, rows};
      rows.forEach(row => { row.run = made; });
      return made;
    });
    options($("run"), [["", "all models"], ...runs.map(run => [run.key, run.label])]);
    options($("beside"), [["", "nothing"], ...runs.map(run => [run.key, run.label])]);
    options($("sort"), SORTS.map(([key, name]) => [key, name]));
    state.run = runs[0]?.key ?? "";
    readHash();
    showControls();
    list = chosenOf(state.run);
    if (!state.neuron && list.length) state.neuron = {run: list[0].run.key, neuron: list[0].neuron};
    reveal();
    drawList();
    showLine();
    await drawCards();
    document.body.dataset.ready = "true";
  };
  for (const key of CONTROLS) {
    $(key).addEventListener("input", () => {
      state[key] = $(key).value;
      state.page = 0;
      drawList();
      drawCards();
    });
  }
  $("controls").addEventListener("submit", event => event.preventDefault());
  $("earlier").addEventListener("click", () => { state.page -= 1; drawList(); });
  $("later").addEventListener("click", () => { state.page += 1; drawList(); });
  addEventListener("hashchange", () => { readHash(); showControls(); list = chosenOf(state.run); reveal(); drawList(); drawCards(); });
  addEventListener("keydown", event => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape" && document.activeElement !== document.body) { document.activeElement.blur(); return; }
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) return;
    const keys = {j: () => step(1), k: () => step(-1), "/": () => $("query").focus(), s: () => {
      const all = Object.keys(STAGES);
      state.stage = all[(all.indexOf(state.stage) + 1) % all.length];
      drawCards();
    }};
    if (keys[event.key]) { event.preventDefault(); keys[event.key](); }
  });
  start().catch(error => { $("status").textContent = error.message; });
})();
