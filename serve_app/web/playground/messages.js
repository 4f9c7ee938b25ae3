"use strict";
// What the page says: failures beside their fields or above the results, and what has been done.

const byId = (id) => document.getElementById(id);

/** A failure in words, and its field; `numTurns` is the length of the prompt that was asked about. */
function describe(failure, numTurns = 0) {
  const { key, limitS } = access();
  const words = inWords(failure, { numTurns, hasKey: key !== "", limitS });
  if (words.field?.turn !== undefined) return { ...words, field: turnList.children[words.field.turn] ?? null };
  if (words.field?.answer !== undefined) return { ...words, field: answerList.children[words.field.answer] ?? null };
  return words;
}

/** Say what is wrong: beside its field, which gets the focus, or above the results. */
function complain({ text, field }) {
  const [control, problem] = field === null ? [null, byId("problem")] : placesOf(field);
  problem.textContent = text;
  problem.hidden = false;
  if (control === null) {
    byId("empty").hidden = true;
    bringIntoView(byId("results-title"));
    return;
  }
  control.setAttribute("aria-invalid", "true");
  if (control.id === "limit") byId("options").open = true;
  if (control.id === "key") byId("key-hint").hidden = false;
  control.focus();
}

function placesOf(field) {
  if (typeof field === "string") return [byId(field), byId(`${field}-problem`)];
  return [textOf(field), field.querySelector(".problem")];
}

function clearProblems() {
  for (const problem of document.querySelectorAll(".problem[role=alert]")) problem.hidden = true;
  for (const control of document.querySelectorAll("[aria-invalid]")) control.removeAttribute("aria-invalid");
}

function announce(text) {
  byId("summary").textContent = text;
}

function bringIntoView(element) {
  const { top, bottom } = element.getBoundingClientRect();
  if (top < 0 || bottom > window.innerHeight * 0.6) element.scrollIntoView({ block: "start" });
}
