"use strict";
// Filters the changed samples. Without it they are all there, in plain <details>.
(() => {
  const bar = document.getElementById("filter");
  if (!bar) return;
  const find = (name) => document.getElementById(`filter-${name}`);
  const [groupOf, wayOf, judgeOf, textOf, told] = ["group", "way", "judge", "text", "count"].map(find);
  const groups = [...document.querySelectorAll("details.samples")].map((element) => ({
    element,
    directions: [...element.querySelectorAll(".direction")],
    samples: [...element.querySelectorAll("details.flip")],
  }));
  const all = groups.reduce((sum, group) => sum + group.samples.length, 0);
  const texts = new Map(); // read once, at the first search
  const textOfSample = (sample) => {
    if (!texts.has(sample)) texts.set(sample, sample.textContent.toLowerCase());
    return texts.get(sample);
  };

  const apply = () => {
    const group = groupOf.value;
    const way = wayOf.value;
    const judge = judgeOf ? judgeOf.value : "";
    const words = textOf.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { element, directions, samples } of groups) {
      let own = 0;
      for (const sample of samples) {
        const fits =
          (!group || element.id === group) &&
          (!way || sample.dataset.way === way) &&
          (!judge || (sample.dataset.judges || "").split(" ").includes(judge)) &&
          words.every((word) => textOfSample(sample).includes(word));
        sample.hidden = !fits;
        if (fits) own += 1;
      }
      element.hidden = own === 0;
      for (const part of directions) part.hidden = !part.querySelector("details.flip:not([hidden])");
      if (own && (group || words.length)) element.open = true;
      shown += own;
    }
    const number = (value) => value.toLocaleString("en");
    told.textContent =
      shown === all ? `${number(all)} samples` : `${number(shown)} of ${number(all)} samples`;
  };

  let waiting = 0;
  const soon = () => {
    clearTimeout(waiting);
    waiting = setTimeout(apply, 120);
  };
  for (const control of [groupOf, wayOf, judgeOf]) if (control) control.addEventListener("change", apply);
  textOf.addEventListener("input", soon);
  textOf.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && textOf.value) {
      event.preventDefault();
      textOf.value = "";
      apply();
    }
  });
  bar.hidden = false;
  apply();
})();
