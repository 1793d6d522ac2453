"use strict";
// Finds the words that two answers do not share, and marks them.

const MOST_CELLS = 12e6; // of the table below; longer answers are marked from the first difference to the last

const wordsOf = (text) =>
  window.Intl && Intl.Segmenter
    ? [...new Intl.Segmenter("en", { granularity: "word" }).segment(text)].map((part) => part.segment)
    : text.match(/\s+|\S+/g) || [];

const isWord = (text) => /[\p{L}\p{N}]/u.test(text);

// Returns runs [shared, words of before, words of after] that, joined, are the two texts: a longest common subsequence.
const runsOf = (before, after) => {
  const runs = [];
  const add = (shared, one, other) => {
    const last = runs[runs.length - 1];
    if (last && last[0] === shared) {
      last[1].push(...one);
      last[2].push(...other);
    } else runs.push([shared, [...one], [...other]]);
  };
  let start = 0;
  while (start < before.length && before[start] === after[start]) start += 1;
  let [one, other] = [before.length, after.length];
  while (one > start && other > start && before[one - 1] === after[other - 1]) [one, other] = [one - 1, other - 1];
  for (let at = 0; at < start; at += 1) add(true, [before[at]], [after[at]]);
  const [tall, wide] = [one - start, other - start];
  if (tall * wide > MOST_CELLS) add(false, before.slice(start, one), after.slice(start, other));
  else {
    const row = wide + 1;
    const longest = new Uint16Array((tall + 1) * row); // of what stands from here to the end
    for (let y = tall - 1; y >= 0; y -= 1)
      for (let x = wide - 1; x >= 0; x -= 1)
        longest[y * row + x] =
          before[start + y] === after[start + x]
            ? longest[(y + 1) * row + x + 1] + 1
            : Math.max(longest[(y + 1) * row + x], longest[y * row + x + 1]);
    let [y, x] = [0, 0];
    while (y < tall || x < wide) {
      if (y < tall && x < wide && before[start + y] === after[start + x]) {
        add(true, [before[start + y]], [after[start + x]]);
        [y, x] = [y + 1, x + 1];
      } else if (x === wide || (y < tall && longest[(y + 1) * row + x] >= longest[y * row + x + 1])) {
        add(false, [before[start + y]], []);
        y += 1;
      } else {
        add(false, [], [after[start + x]]);
        x += 1;
      }
    }
  }
  for (let at = one; at < before.length; at += 1) add(true, [before[at]], [after[at - one + other]]);
  return runs;
};

// A single word that two otherwise different passages happen to share is no common ground.
const withoutIslands = (runs) => {
  const joined = [];
  runs.forEach(([shared, one, other], at) => {
    const island = shared && at > 0 && at < runs.length - 1 && one.filter(isWord).length < 2;
    const last = joined[joined.length - 1];
    if (last && last[0] === (shared && !island)) {
      last[1].push(...one);
      last[2].push(...other);
    } else joined.push([shared && !island, [...one], [...other]]);
  });
  return joined;
};

// Marks both paragraphs and says in words how much differs.
const markWords = (before, after) => {
  const runs = withoutIslands(runsOf(wordsOf(before.textContent), wordsOf(after.textContent)));
  const fill = (paragraph, tag, place) =>
    paragraph.replaceChildren(
      ...runs
        .filter((run) => run[place].length)
        .map((run) => {
          const text = document.createTextNode(run[place].join(""));
          if (run[0]) return text;
          const mark = document.createElement(tag);
          mark.append(text);
          return mark;
        }),
    );
  fill(before, "del", 1);
  fill(after, "ins", 2);
  const count = (shared, place) =>
    runs.filter((run) => run[0] === shared).reduce((sum, run) => sum + run[place].filter(isWord).length, 0);
  return { removed: count(false, 1), added: count(false, 2), kept: count(true, 1) };
};
