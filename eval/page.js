// The examples of a report: searched as one types, made only as far as they are shown. Text from outside is inserted
// as text and never as HTML.
(() => {
  "use strict";
  const PAGE_SIZE = 40;
  // A prompt of more characters is no heading.
  const LONG = 300;
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("data").textContent);
  const [query, split, order, count, list, more] = ["query", "split", "order", "count", "list", "more"].map(byId);
  const folded = new WeakMap();
  let found = [];
  let numShown = 0;

  // Case and accents do not matter: "vasquez" finds "Vásquez". Character by character, so that places can be mapped back.
  const foldCharacter = (c) => c.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase();
  const fold = (text) => (/^[\x00-\x7f]*$/.test(text) ? text.toLowerCase() : Array.from(text, foldCharacter).join(""));
  const words = () => fold(query.value).split(/\s+/).filter(Boolean);

  function searchable(row) {
    if (!folded.has(row)) {
      const answers = row.answers.filter(Boolean).map(([text]) => text);
      folded.set(row, fold([row.question, row.truth, ...answers].join("\n")));
    }
    return folded.get(row);
  }

  function element(tag, className, ...children) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children);
    return made;
  }

  // Where the words are, as pairs of places in the text itself, in order and apart.
  function matches(text, wanted) {
    const places = [];
    let whole = "";
    let place = 0;
    for (const character of text) {
      const part = foldCharacter(character);
      for (let unit = 0; unit < part.length; unit++) places.push([place, place + character.length]);
      whole += part;
      place += character.length;
    }
    const spans = [];
    for (const word of wanted) {
      for (let at = whole.indexOf(word); at >= 0; at = whole.indexOf(word, at + word.length)) {
        spans.push([places[at][0], places[at + word.length - 1][1]]);
      }
    }
    spans.sort((a, b) => a[0] - b[0]);
    const apart = [];
    for (const [start, end] of spans) {
      const last = apart[apart.length - 1];
      if (last && start <= last[1]) last[1] = Math.max(last[1], end);
      else apart.push([start, end]);
    }
    return apart;
  }

  function marked(text, wanted) {
    const parts = [];
    let place = 0;
    for (const [start, end] of matches(text, wanted)) {
      parts.push(text.slice(place, start), element("mark", "", text.slice(start, end)));
      place = end;
    }
    return [...parts, text.slice(place)];
  }

  function example(row, wanted) {
    const question = row.question || `Row ${row.index}`;
    const heading = element("h3", question.length > LONG ? "long" : "", ...marked(question, wanted));
    if (heading.className) heading.tabIndex = 0; // it scrolls
    const made = element("article", "example", heading);
    if (row.truth) {
      made.append(element("p", "truth", element("span", "label", "true answer"), ...marked(row.truth, wanted)));
    }
    const columns = element("div", "answers");
    row.answers.forEach((answer, place) => {
      const head = element("h4", `run run${place}`, data.runs[place]);
      if (!answer) return columns.append(element("div", "missing", head, element("p", "", "was not asked")));
      const [text, score] = answer;
      if (score !== null) head.append(element("span", "score", score.toFixed(2)));
      const said = text ? element("p", "", ...marked(text, wanted)) : element("p", "nothing", "(nothing)");
      columns.append(element("div", "", head, said));
    });
    made.append(columns);
    return made;
  }

  function showMore() {
    const wanted = words();
    const next = found.slice(numShown, numShown + PAGE_SIZE);
    const first = list.children.length;
    list.append(...next.map((row) => example(row, wanted)));
    numShown += next.length;
    const total = data.splits[split.selectedIndex].rows.length;
    const rest = found.length - numShown;
    const matching = rest && found.length < total ? `, ${found.length} match` : "";
    count.textContent = `${numShown} of ${total} shown${matching}`;
    more.hidden = !rest;
    more.textContent = `Show ${Math.min(rest, PAGE_SIZE)} more`;
    return list.children[first];
  }

  function rowsWith(wanted, rows) {
    return wanted.length ? rows.filter((row) => wanted.every((word) => searchable(row).includes(word))) : [...rows];
  }

  function notFound(wanted) {
    const elsewhere = data.splits.map(({ name, rows }) => [name, rowsWith(wanted, rows).length]).filter(([, n]) => n);
    const hint = elsewhere.map(([name, number]) => `${number} of ${name}`).join(", ");
    return element("p", "none", `None of these rows has all of the words${hint ? `; others have: ${hint}` : ""}.`);
  }

  function update() {
    const wanted = words();
    found = rowsWith(wanted, data.splits[split.selectedIndex].rows);
    const run = order.selectedIndex - 1;
    const score = (row) => row.answers[run]?.[1] ?? -Infinity;
    if (run >= 0) found.sort((a, b) => (score(a) === score(b) ? 0 : score(b) - score(a)));
    list.replaceChildren();
    numShown = 0;
    showMore();
    if (!found.length) list.append(notFound(wanted));
  }

  function changeSplit() {
    const { score } = data.splits[split.selectedIndex];
    byId("order-label").hidden = !score;
    if (!score) order.selectedIndex = 0;
    update();
  }

  split.append(...data.splits.map(({ name, rows }) => new Option(`${name} (${rows.length})`)));
  order.append(new Option("as in the data"), ...data.runs.map((name) => new Option(`highest score of ${name} first`)));
  query.addEventListener("input", update);
  split.addEventListener("change", changeSplit);
  order.addEventListener("change", update);
  more.addEventListener("click", () => {
    const first = showMore();
    // The button may be gone; whoever pressed it with a key goes on reading where the new rows begin.
    first.tabIndex = -1;
    first.focus({ preventScroll: true });
  });
  byId("examples").hidden = false;
  changeSplit();
})();
