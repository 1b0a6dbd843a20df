"use strict";
// The browser for trajectories. Everything shown comes from models and documents, so it is set as text, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const last = data.runs.length - 1;
  let current = null;

  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  };
  const page = ([file, number]) => `${file}, page ${number}`;
  const rank = (run, value) => (run.searches === 0 ? "no search" : value === null ? "missed" : `rank ${value}`);
  const unseen = (run, value) => (value !== null && run.shown !== null && value > run.shown ? `, beyond the ${run.shown} shown` : "");
  const worth = (value) => (value === null ? 0 : 1 / value);
  const change = (question) =>
    worth(question.runs[Number($("after").value)].first) - worth(question.runs[Number($("before").value)].first);

  const CHANGES = {
    all: ["all questions", () => true],
    better: ["changed for the better", (question) => change(question) > 0],
    worse: ["changed for the worse", (question) => change(question) < 0],
    same: ["same rank", (question) => change(question) === 0],
    missed: ["missed by both", (question) => [$("before"), $("after")].every((s) => question.runs[Number(s.value)].first === null)],
    failed: ["rollout failed", (question) => question.runs.some((run) => run.rollout && run.rollout.failed)],
  };

  const options = (select, pairs, chosen) => {
    select.replaceChildren(...pairs.map(([value, text]) => make("option", { value }, text)));
    select.value = chosen;
  };
  const haystack = (question) =>
    [question.id, question.question, question.category, ...question.runs.map((run) => run.query || "")].join("\n").toLowerCase();

  const rollout = (run) => {
    const record = run.rollout;
    if (!record) {
      const query = run.query === null ? make("p", { class: "failure" }, "No search.") : make("p", { class: "query" }, run.query);
      return [make("div", { class: "turn" }, query)];
    }
    const parts = record.turns.map(turn);
    if (record.failed)
      parts.push(make("div", { class: "turn failure" }, `The rollout failed: ${record.outcome}. ${record.detail || ""}`));
    if (record.answer !== null) {
      const cited = record.cited.map(([file, number, right, seen]) =>
        make("span", right ? { class: "hit" } : {}, page([file, number]), seen === false ? make("i", { class: "failure" }, " (no search had shown it)") : null));
      parts.push(
        make("div", { class: "turn" }, make("p", {}, make("b", {}, "Answer: "), record.answer),
          cited.length ? make("p", { class: "cited" }, "Cites: ", ...cited) : null),
      );
    } else if (!record.failed) parts.push(make("div", { class: "turn note" }, `No answer: ${record.outcome.replaceAll("_", " ")}.`));
    return parts;
  };

  const turn = (record) => {
    const parts = [];
    if (record.reasoning) parts.push(make("p", { class: "think" }, record.reasoning));
    for (const search of record.searches) {
      parts.push(make("p", { class: "query" }, search.query));
      if (search.words) parts.push(make("p", { class: "note" }, "Could not be parsed; searched as plain words."));
      if (search.searched !== null) parts.push(make("p", { class: "note" }, `Searched as: ${search.searched}`));
      const hits = search.results.map(([file, number, right]) => make("li", right ? { class: "hit" } : {}, page([file, number])));
      parts.push(hits.length ? make("ol", {}, ...hits) : make("p", { class: "note" }, "Nothing matched."));
    }
    if (record.failure) parts.push(make("p", { class: "failure" }, `No valid action: ${record.failure.replaceAll("_", " ")}.`));
    if (record.raw) parts.push(make("div", { class: "raw", tabindex: "0" }, record.raw));
    return parts.length ? make("div", { class: "turn" }, ...parts) : null;
  };

  const side = (question, number) => {
    const run = question.runs[number];
    const best = run.best !== null && run.best !== run.first ? `, best search ${rank(run, run.best)}${unseen(run, run.best)}` : "";
    const first = run.searches === 0 ? "no search" : `first search ${rank(run, run.first)}${unseen(run, run.first)}`;
    return make("section", { class: `side run-${number % 6}`, "aria-label": data.runs[number] },
      make("h4", { class: `run-${number % 6}` }, data.runs[number]),
      make("p", { class: "ranks" }, `${run.end ? `${run.end} · ` : ""}${first}${best}`),
      ...rollout(run).filter(Boolean));
  };

  const show = (question) => {
    current = question;
    const shown = [...new Set([Number($("before").value), Number($("after").value)])];
    $("detail").replaceChildren(...(question === null ? [make("p", { class: "note" }, "No question matches.")] : [
      make("h3", {}, question.question),
      make("p", { class: "truth" }, "Answer: ", make("b", {}, question.answers.join(" or ") || "not given")),
      make("p", { class: "truth" }, "On: ", make("b", {}, question.pages.map(page).join("; ") || "not given")),
      make("p", { class: "truth" }, [question.id, question.category].filter(Boolean).join(" · ")),
      make("div", { class: "sides" }, ...shown.map((number) => side(question, number))),
    ]));
    for (const button of $("list").querySelectorAll("button"))
      button.dataset.id === (question && question.id) ? button.setAttribute("aria-current", "true") : button.removeAttribute("aria-current");
  };

  const choose = (question) => {
    show(question);
    history.replaceState(null, "", `#question=${encodeURIComponent(question.id)}`);
    if (matchMedia("(max-width: 760px)").matches) $("detail").scrollIntoView();
  };

  const entry = (question) => {
    const gain = change(question);
    const [before, after] = [$("before"), $("after")].map((select) => question.runs[Number(select.value)]).map((run) => rank(run, run.first));
    const mark = gain > 0 ? "▲ " : gain < 0 ? "▼ " : "";
    const move = make("span", { class: `move ${gain > 0 ? "improved" : gain < 0 ? "worse" : "cannot-tell"}` }, `${mark}${before} → ${after}`);
    const button = make("button", { type: "button", "data-id": question.id }, question.question, move);
    button.addEventListener("click", () => choose(question));
    return make("li", {}, button);
  };

  const update = () => {
    const words = $("find").value.toLowerCase().split(/\s+/).filter(Boolean);
    const wanted = data.questions.filter(
      (question) =>
        words.every((word) => question.haystack.includes(word)) &&
        ($("category").value === "" || question.category === $("category").value) &&
        CHANGES[$("change").value][1](question) &&
        ($("end").value === "" || question.runs[Number($("after").value)].end === $("end").value),
    );
    $("list").replaceChildren(...wanted.map(entry));
    const cut = data.questions.length < data.all ? `, of ${data.all} measured; those that changed were kept first` : "";
    $("count").textContent = `${wanted.length} of ${data.questions.length} questions${cut}.`;
    show(wanted.includes(current) ? current : wanted[0] || null);
  };

  // Arrow keys walk the list, as in any list.
  $("list").addEventListener("keydown", (event) => {
    const item = document.activeElement.closest("li");
    const next = item && { ArrowDown: item.nextElementSibling, ArrowUp: item.previousElementSibling }[event.key];
    if (next) {
      event.preventDefault();
      next.firstChild.focus();
      next.firstChild.click();
    }
  });

  for (const question of data.questions) question.haystack = haystack(question);
  const runs = data.runs.map((name, number) => [number, name]);
  options($("before"), runs, String(Math.max(last - 1, 0)));
  options($("after"), runs, String(last));
  const categories = [...new Set(data.questions.map((question) => question.category))].filter(Boolean).sort();
  options($("category"), [["", "all"], ...categories.map((name) => [name, name])], "");
  const ends = [...new Set(data.questions.flatMap((question) => question.runs.map((run) => run.end)))].filter(Boolean).sort();
  options($("end"), [["", "anyhow"], ...ends.map((name) => [name, name])], "");
  options($("change"), Object.entries(CHANGES).map(([name, [text]]) => [name, text]), "all");
  for (const id of ["find", "before", "after", "category", "change", "end"]) $(id).addEventListener("input", update);
  const linked = decodeURIComponent(location.hash.replace(/^#question=/, ""));
  current = data.questions.find((question) => question.id === linked) || null;
  $("browser").hidden = false;
  update();
  if (linked && current && current.id === linked) $("questions").scrollIntoView({ behavior: "instant" });
})();
