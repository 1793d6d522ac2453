
// Filters the changed samples and steps through them. Without it they are all there, in plain <details>.
(() => {
  const section = document.getElementById("samples");
  const bar = document.getElementById("filter");
  if (!section || !bar) return;
  const get = (id) => document.getElementById(id);
  const [tour, help, keys, marks, place, told] = [
    "tour", "tour-help", "tour-keys", "tour-marks", "tour-place", "filter-count",
  ].map(get);
  const number = (value) => value.toLocaleString("en");
  const groups = [...section.querySelectorAll("details.samples")].map((element) => ({
    element,
    directions: [...element.querySelectorAll(".direction")],
    samples: [...element.querySelectorAll("details.flip")],
  }));
  const flips = groups.flatMap((group) => group.samples);
  const hidden = (flip) => flip.hidden || flip.closest(".samples").hidden;
  const nameOf = (flip) => [JSON.parse(flip.dataset.suiteName || "null"), JSON.parse(flip.dataset.name)];
  const labels = openLabels(
    section.dataset.report,
    flips.filter((flip) => flip.dataset.name).map(nameOf),
  );

  // The filter.
  const fields = ["kind", "type", "way", "category", "judge", "suite", "label"].filter((name) => get(`filter-${name}`));
  const textOf = get("filter-text");
  const texts = new Map(); // read once, at the first search
  const textOfSample = (flip) => {
    if (!texts.has(flip)) texts.set(flip, flip.textContent.toLowerCase());
    return texts.get(flip);
  };
  const labelled = (flip) =>
    flip.dataset.name && ["baseline", "candidate"].some((run) => labels.get(...nameOf(flip), run) !== undefined);
  const fitsField = {
    kind: (flip, value) => flip.dataset.kind === value,
    type: (flip, value) => flip.dataset.type === value,
    category: (flip, value) => flip.dataset.category === value,
    suite: (flip, value) => flip.dataset.suite === value,
    way: (flip, value) => flip.dataset.way === value || flip.dataset.became === value,
    judge: (flip, value) => flip.dataset.judge.split("\n").includes(value),
    label: (flip, value) => Boolean(flip.dataset.name) && Boolean(labelled(flip)) === (value === "done"),
  };
  const apply = () => {
    const asked = fields.map((name) => [name, get(`filter-${name}`).value]).filter(([, value]) => value);
    const words = textOf.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { element, directions, samples } of groups) {
      let own = 0;
      for (const flip of samples) {
        const fits =
          asked.every(([name, value]) => fitsField[name](flip, value)) &&
          words.every((word) => textOfSample(flip).includes(word));
        flip.hidden = !fits;
        if (fits) own += 1;
      }
      element.hidden = own === 0;
      for (const part of directions) part.hidden = !part.querySelector("details.flip:not([hidden])");
      if (own && (asked.length || words.length)) element.open = true;
      shown += own;
    }
    const all = flips.length;
    told.textContent = shown === all ? `${number(all)} samples` : `${number(shown)} of ${number(all)} samples`;
  };
  let waiting = 0;
  const soon = () => {
    clearTimeout(waiting);
    waiting = setTimeout(apply, 120);
  };
  for (const name of fields) get(`filter-${name}`).addEventListener("change", apply);
  textOf.addEventListener("input", soon);
  textOf.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && textOf.value) {
      event.preventDefault();
      textOf.value = "";
      apply();
    }
  });

  // Labels: two buttons below each answer, made when its sample is first opened.
  const good = (flip, run) => (flip.dataset.way === "worse") === (run === "baseline");
  const make = (tag, name, ...content) => {
    const element = document.createElement(tag);
    element.className = name;
    element.append(...content);
    return element;
  };
  const paint = (flip) => {
    if (!flip.dataset.name) return;
    let own = 0;
    for (const run of ["baseline", "candidate"]) {
      const label = labels.get(...nameOf(flip), run);
      if (label !== undefined) own += 1;
      for (const button of flip.querySelectorAll(`[data-run="${run}"] button`))
        button.setAttribute("aria-pressed", String(label === (button.dataset.ok === "true")));
    }
    const summary = flip.querySelector("summary");
    const tag = summary.querySelector(".tagged") || make("span", "tagged");
    tag.textContent = `✎ ${own} labelled`;
    if (own) summary.append(tag);
    else tag.remove();
  };
  const count = () => {
    get("labels-count").textContent = labels.size === 1 ? "1 label" : `${number(labels.size)} labels`;
    get("labels-save").disabled = labels.size === 0;
    get("labels-kept").textContent = labels.kept
      ? "Until you save it, labels are kept by this browser, for this report alone."
      : "This browser keeps nothing for this page: save labels before you close it.";
  };
  const paintAll = () => {
    flips.forEach(paint);
    count();
  };
  const label = (flip, run, ok) => {
    const name = nameOf(flip);
    const taken = labels.get(...name, run) === ok;
    labels.set(...name, run, taken ? undefined : ok);
    const side = run === "baseline" ? "before" : "after";
    place.textContent = `Answer ${side}: ${taken ? "not labelled" : ok === good(flip, run) ? "agreed" : "disagreed"}`;
    for (const same of flips) if (same.dataset.name === flip.dataset.name) paint(same); // judges may disagree
    count();
  };
  const addButtons = (flip) => {
    for (const answer of flip.querySelectorAll(".answer")) {
      const { run } = answer.dataset;
      const group = make("div", "label");
      group.setAttribute("role", "group");
      group.setAttribute("aria-label", `Label of the answer ${run === "baseline" ? "before" : "after"}`);
      group.append(make("span", "score", `Scored “${answer.querySelector(".score").textContent}”: `));
      for (const agrees of [true, false]) {
        const key = String((run === "baseline" ? 1 : 3) + (agrees ? 0 : 1));
        const button = make("button", "", agrees ? "Agree " : "Disagree ", make("kbd", "", key));
        button.type = "button";
        button.dataset.ok = String(good(flip, run) === agrees);
        button.addEventListener("click", () => label(flip, run, good(flip, run) === agrees));
        group.append(button);
      }
      answer.append(group);
    }
    paint(flip);
  };

  // What is done when a sample is opened and closed.
  const done = new Set();
  let current = null;
  const opened = (flip) => {
    current = flip;
    if (done.has(flip)) return;
    done.add(flip);
    flip.style.contentVisibility = "visible"; // else the height it had when open is remembered after it is closed
    textOfSample(flip); // before anything is added
    const [before, after] = flip.querySelectorAll(".words");
    const { removed, added, kept } = markWords(before, after);
    flip.classList.toggle("apart", 4 * kept < Math.min(removed, added) + kept); // long passages stay legible
    const differ = `Words: ${number(removed)} only before, ${number(added)} only after, ${number(kept)} in both.`;
    after.closest(".answer").after(make("p", "note", differ));
    if (flip.dataset.name) addButtons(flip);
  };
  const blur = (flip) => {
    for (const veil of flip.querySelectorAll(".veil")) veil.open = false;
  };
  section.addEventListener(
    "toggle",
    ({ target }) => {
      if (!target.matches(".flip")) return;
      if (target.open) opened(target);
      else blur(target);
    },
    true,
  );
  section.addEventListener("focusin", ({ target }) => {
    current = target.closest(".flip") || current;
  });

  // Stepping through.
  const bringIntoView = (flip) => {
    const scroll = () => {
      if (current === flip) flip.scrollIntoView({ block: "start", behavior: "instant" });
    };
    scroll();
    requestAnimationFrame(() => requestAnimationFrame(scroll)); // what was skipped above it has its real height now
  };
  const step = (way) => {
    let at = current ? flips.indexOf(current) + way : way > 0 ? 0 : flips.length - 1;
    while (flips[at] && hidden(flips[at])) at += way;
    const next = flips[at];
    if (!next) {
      place.textContent = way > 0 ? "This was the last sample." : "This was the first sample.";
      return;
    }
    if (current) {
      current.open = false;
      blur(current);
    }
    next.closest(".samples").open = true;
    next.open = true;
    opened(next); // at once: its event comes later, perhaps after the next key
    next.querySelector("summary").focus({ preventScroll: true });
    bringIntoView(next);
    const shown = flips.filter((flip) => !hidden(flip));
    place.textContent = `Sample ${number(shown.indexOf(next) + 1)} of ${number(shown.length)}`;
  };
  const press = (key) => {
    const flip = current && current.open && !hidden(current) ? current : null;
    if (key === "j" || key === "arrowright") step(1);
    else if (key === "k" || key === "arrowleft") step(-1);
    else if (key === "i") {
      const veil = flip && flip.querySelector(".veil");
      if (veil) veil.open = !veil.open;
    } else if (/^[1-4]$/.test(key)) {
      const button = flip && flip.querySelectorAll(".label button")[Number(key) - 1];
      if (button) button.click();
    } else return false;
    return true;
  };
  document.addEventListener("keydown", (event) => {
    const { target } = event;
    if (!keys.checked || event.defaultPrevented || event.isComposing) return;
    if (event.ctrlKey || event.altKey || event.metaKey) return;
    if (target.closest("input, select, textarea")) return;
    const inside = section.contains(target);
    if (!inside && (target !== document.body || event.key.startsWith("Arrow"))) return;
    if (press(event.key.toLowerCase())) event.preventDefault();
  });
  get("tour-next").addEventListener("click", () => step(1));
  get("tour-previous").addEventListener("click", () => step(-1));
  get("labels-save").addEventListener("click", () => labels.save());
  marks.addEventListener("change", () => section.classList.toggle("unmarked", !marks.checked));
  labels.onChange(paintAll);
  const measure = () => section.style.setProperty("--tour", `${tour.offsetHeight}px`);
  addEventListener("resize", measure);

  for (const part of [bar, tour, help]) part.hidden = false;
  measure();
  paintAll();
  apply();
})();
