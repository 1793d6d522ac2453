
// Labels of people: whether an answer did what its pair asks for. Kept by this browser under the report's own name, so
// that no other report's labels mix in; saved as labels.jsonl.

const openLabels = (report, named) => {
  const place = `safevlm-labels-${report}`;
  const keyOf = (suite, id, run) => JSON.stringify([suite, id, run]);
  const known = new Set(named.flatMap(([suite, id]) => ["baseline", "candidate"].map((run) => keyOf(suite, id, run))));
  let labels = new Map();
  let kept = true;
  let saved = true;

  const load = () => {
    try {
      const found = Object.entries(JSON.parse(localStorage.getItem(place) || "{}"));
      labels = new Map(found.filter(([key, ok]) => known.has(key) && typeof ok === "boolean"));
    } catch {
      kept = false; // storage is off, or what it holds is not ours: labels live until the page is closed
    }
  };
  const keep = () => {
    try {
      localStorage.setItem(place, JSON.stringify(Object.fromEntries(labels)));
      kept = true;
    } catch {
      kept = false;
    }
  };
  load();
  addEventListener("beforeunload", (event) => {
    if (!kept && !saved) event.preventDefault();
  });

  return {
    get: (suite, id, run) => labels.get(keyOf(suite, id, run)),
    set(suite, id, run, ok) {
      if (kept) load(); // another tab may have written
      if (ok === undefined) labels.delete(keyOf(suite, id, run));
      else labels.set(keyOf(suite, id, run), ok);
      saved = false;
      keep();
    },
    get size() {
      return labels.size;
    },
    get kept() {
      return kept;
    },
    onChange(act) {
      addEventListener("storage", (event) => {
        if (event.key !== place && event.key !== null) return;
        load();
        act();
      });
    },
    save() {
      const lines = [...known].flatMap((key) => {
        if (!labels.has(key)) return [];
        const [suite, id, run] = JSON.parse(key);
        return [JSON.stringify({ id, ok: labels.get(key), run, ...(suite === null ? {} : { suite }) })];
      });
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([`${lines.join("\n")}\n`], { type: "application/x-ndjson" }));
      link.download = "labels.jsonl";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
      saved = true;
    },
  };
};
