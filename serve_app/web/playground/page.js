"use strict";
// The page at work: ranking on request, buttons and keys.

const EXAMPLES = JSON.parse(document.getElementById("examples").textContent);
let underWay = null; // the AbortController of the ranking that runs
let shown = null; // the requests whose answers are shown, as JSON
let replaced = null; // the draft that an example or Clear took the place of
let numExamples = 0;

// -- ranking ----------------------------------------------------------------------------------------------------------

/** The body of POST /v1/score for each model chosen. */
function requests({ turns, answers }) {
  const conversations = answers.map((content) => [...turns, { role: "assistant", content }]);
  const names = [byId("model").value, byId("second-setting").hidden ? NO_MODEL : byId("second-model").value];
  const truncation = byId("truncation").value;
  return names.filter((name) => name !== NO_MODEL).map((model) => ({ model, conversations, truncation }));
}

async function rank() {
  if (underWay) return;
  clearProblems();
  if (!isComplete()) return;
  begin();
  const { signal } = underWay;
  const draft = readDraft();
  const bodies = await requestsFor(draft);
  const outcomes = await Promise.all(bodies.map((body) => outcomeOf(body, signal)));
  end();
  if (bodies.length === 0) announce("");
  else if (signal.aborted) announce(shown === null ? "Stopped." : "Stopped. The ranking below is the one before.");
  else if (outcomes.some((outcome) => outcome.standings)) present(outcomes, draft, bodies);
  else reject(outcomes);
}

/** The same, with models read anew where none are known; none where that fails, which is shown. */
async function requestsFor(draft) {
  return models.length > 0 || (await loadModels()) ? requests(draft) : [];
}

/** Whether everything is filled in; what is not is said beside its field. */
function isComplete() {
  const field = emptyField();
  if (field) complain({ text: `${nameOf(field)} is empty: write it, or remove it.`, field });
  else if (!byId("limit").validity.valid) complain({ text: "A whole number from 1 to 3600.", field: "limit" });
  else return true;
  return false;
}

async function outcomeOf(body, signal) {
  const start = performance.now();
  try {
    const results = await fetchScores(body, { ...access(), signal });
    const scores = results.map((result) => result.score);
    const seconds = (performance.now() - start) / 1000;
    return { model: body.model, seconds, results, scores, standings: standingsOf(results) };
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    const { text, field } = describe(error, body.conversations[0].length - 1);
    return { model: body.model, status: error.status, words: text, field };
  }
}

function begin() {
  underWay = new AbortController();
  byId("rank").setAttribute("aria-disabled", "true");
  byId("rank-label").textContent = "Ranking\u2026";
  byId("stop").hidden = false;
  announce("Ranking\u2026");
}

function end() {
  const hadFocus = document.activeElement === byId("stop");
  underWay = null;
  byId("rank").removeAttribute("aria-disabled");
  byId("rank-label").textContent = "Rank answers";
  byId("stop").hidden = true;
  if (hadFocus) byId("rank").focus();
}

function present(outcomes, draft, bodies) {
  shown = JSON.stringify(bodies);
  showOutcomes(outcomes, draft.answers);
  byId("command").textContent = bodies.map((body) => curlCommand(body, access().key !== "")).join("\n\n");
  byId("copy").textContent = "Copy";
  markStale();
  announce(summaryOf(outcomes));
  bringIntoView(byId("results-title"));
}

function reject(outcomes) {
  shown = null;
  markStale();
  hideOutcomes();
  announce("");
  const [first] = outcomes;
  const allHave = (name) => outcomes.every((outcome) => outcome[name] === first[name]);
  const text = allHave("words") ? first.words : outcomes.map(({ model, words }) => `${model}: ${words}`).join(" ");
  complain({ text, field: allHave("field") ? first.field : null });
  if (outcomes.some((outcome) => outcome.status === 404)) loadModels();
}

/** Results of an earlier text are marked as such until the text is as it was, or is ranked again. */
function markStale() {
  if (underWay) return;
  const isStale = shown !== null && shown !== JSON.stringify(requests(readDraft()));
  byId("results").classList.toggle("stale", isStale);
  if (byId("stale").hidden === isStale) byId("stale").hidden = !isStale; // told once, not at every key
}

// -- buttons and keys -------------------------------------------------------------------------------------------------

/** Put `draft` in the place of what is written, which Undo brings back. */
function replaceDraft(draft, otherwise = replaced) {
  const before = readDraft();
  const isOurs = isBlank(before) || EXAMPLES.some((example) => JSON.stringify(example) === JSON.stringify(before));
  replaced = isOurs ? otherwise : before;
  clearProblems();
  writeDraft(draft);
  byId("undo").hidden = replaced === null;
  markStale();
}

/** Once more goes back again, where anything was written in between. */
function undo() {
  replaceDraft(replaced, null);
  textOf(turnList.firstElementChild).focus();
}

function onInput(event) {
  if (event.target.matches(".role")) relabel();
  markStale();
}

function onKey(event) {
  if (event.isComposing) return; // Enter there chooses a Chinese character
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    rank();
  } else if (event.key === "Escape" && underWay) {
    underWay.abort();
  }
}

function nextExample() {
  replaceDraft(EXAMPLES[numExamples % EXAMPLES.length]);
  numExamples += 1;
}

async function copyCommand() {
  const copied = navigator.clipboard.writeText(byId("command").textContent);
  byId("copy").textContent = await copied.then(() => "Copied", () => "The browser refuses to copy");
}

function start() {
  writeDraft(BLANK);
  const onClick = (id, action) => byId(id).addEventListener("click", action);
  onClick("add-system", () => textOf(addTurn({ role: "system", content: "" }, 0)).focus());
  onClick("add-turn", () => textOf(addTurn({ role: nextRole(), content: "" })).focus());
  onClick("add-answer", () => textOf(addAnswer("")).focus());
  onClick("stop", () => underWay?.abort());
  onClick("example", nextExample);
  onClick("clear", () => replaceDraft(BLANK));
  onClick("undo", undo);
  onClick("copy", copyCommand);
  byId("editor").addEventListener("submit", (event) => {
    event.preventDefault();
    rank();
  });
  byId("editor").addEventListener("input", onInput);
  byId("key").addEventListener("change", changeKey);
  byId("model").addEventListener("change", () => (offerSecondModels(), markStale()));
  byId("second-model").addEventListener("change", markStale);
  document.addEventListener("keydown", onKey);
  byId("copy").hidden = !navigator.clipboard; // it is there on HTTPS and localhost alone
  if (/Mac|iP/.test(navigator.platform)) byId("shortcut").textContent = "\u2318 Enter";
  loadModels();
}

start();
