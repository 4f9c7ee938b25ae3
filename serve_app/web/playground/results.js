"use strict";
// What is shown of the answers of one or two models. All text goes in as textContent.

const columnList = document.getElementById("columns");

/** An outcome is `{ model, seconds, results, scores, standings }`, or `{ model, words }` where a model failed. */
function showOutcomes(outcomes, answers) {
  const ranked = outcomes.filter((outcome) => outcome.standings);
  columnList.replaceChildren(...outcomes.map((outcome) => columnOf(outcome, answers, ranked)));
  columnList.classList.toggle("pair", outcomes.length > 1);
  document.getElementById("footnote").textContent = footnoteOf(outcomes);
  for (const id of ["footnote", "request"]) document.getElementById(id).hidden = false;
  document.getElementById("empty").hidden = true;
  columnList.querySelectorAll(".standing").forEach(offerWholeText);
}

function summaryOf(outcomes) {
  const ranked = outcomes.filter((outcome) => outcome.standings);
  if (ranked.length === 2) return jointVerdict(ranked);
  const [{ model, standings }] = ranked;
  return outcomes.length === 1 ? verdict(standings) : `${model}: ${verdict(standings)} The other model failed.`;
}

function hideOutcomes() {
  columnList.replaceChildren();
  for (const id of ["footnote", "request"]) document.getElementById(id).hidden = true;
}

function columnOf(outcome, answers, ranked) {
  const column = document.getElementById("column-template").content.firstElementChild.cloneNode(true);
  column.querySelector("h3").textContent = outcome.model;
  if (!outcome.standings) {
    const problem = column.querySelector(".problem");
    problem.textContent = outcome.words;
    problem.hidden = false;
    return column;
  }
  const tokens = outcome.results.reduce((sum, result) => sum + result.num_tokens, 0);
  const facts = [counted(outcome.results.length, "answer"), counted(tokens, "token"), `${outcome.seconds.toFixed(2)}\u00a0s`];
  column.querySelector(".facts").textContent = facts.join(" \u00b7 ");
  const lengths = barLengths(outcome.scores);
  const other = ranked.find((each) => each !== outcome) ?? null;
  const items = outcome.standings.map((standing) => standingOf(standing, answers, lengths[standing.place], other));
  column.querySelector(".standings").append(...items);
  return column;
}

function standingOf(standing, answers, barLength, other) {
  const item = document.getElementById("standing-template").content.firstElementChild.cloneNode(true);
  const part = (name) => item.querySelector(name);
  part(".rank").textContent = ordinal(standing.rank);
  part(".letter").textContent = letterOf(standing.place);
  part(".value").textContent = scoreText(standing.score);
  part(".value").title = String(standing.score);
  part(".text").textContent = answers[standing.place];
  part(".fill").style.width = `${100 * barLength}%`; // as a property: the page's policy forbids style attributes
  part(".facts").textContent = factsOf(standing, other).join(" \u00b7 ");
  if (standing.next !== null) {
    part(".ahead").textContent = leadText(standing);
    part(".ahead").hidden = false;
  }
  return item;
}

function factsOf(standing, other) {
  const facts = [counted(standing.num_tokens, "token")];
  if (standing.truncated) facts.push("shortened to fit");
  const rank = other?.standings.findIndex((theirs) => theirs.place === standing.place);
  if (other && rank !== standing.rank) facts.push(`${ordinal(rank)} with ${other.model}`);
  return facts;
}

function footnoteOf(outcomes) {
  const notes = ["Scores are raw logits; a bar is the lead over the last answer. An answer that is ahead by m is " +
    "preferred with the probability 1/(1 + e^\u2212m) (Bradley-Terry). Tokens include the prompt."];
  if (outcomes.length > 1) notes.push("Scores of different models have different scales.");
  if (outcomes.some((outcome) => outcome.model === "tiny")) {
    notes.push(`${EMBEDDED_NOTE}.`);
  }
  return notes.join(" ");
}

/** A long text is shown in part; the button tells the rest. Only text in the page can tell whether it is long. */
function offerWholeText(item) {
  const text = item.querySelector(".text");
  const more = item.querySelector(".more");
  if (text.scrollHeight <= text.clientHeight + 1) return;
  more.hidden = false;
  more.addEventListener("click", () => {
    const isWhole = text.classList.toggle("whole");
    more.setAttribute("aria-expanded", String(isWhole));
    more.textContent = isWhole ? "Show less" : "Show all";
  });
}
