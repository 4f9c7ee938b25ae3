"use strict";
// Which models are asked, with which key and time limit.

const NO_MODEL = "";
const DEFAULT_LIMIT_S = 120;
let models = []; // as GET /v1/models lists them
let numLoads = 0;

/** Read the list of models; a failure is shown. Returns whether there are models. */
async function loadModels() {
  const turn = ++numLoads;
  try {
    const found = await fetchModels(access());
    if (turn === numLoads) models = found;
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    if (turn !== numLoads) return models.length > 0; // of a key that has been changed since
    models = [];
    fillSelect(byId("model"), [], "none");
    byId("second-setting").hidden = true;
    complain(describe(error));
    return false;
  }
  const names = models.map((model) => model.id);
  const before = byId("model").value;
  fillSelect(byId("model"), names);
  if (names.includes(before)) byId("model").value = before;
  byId("second-setting").hidden = names.length < 2;
  offerSecondModels();
  byId("key").placeholder = byId("key").value ? "" : "not needed here";
  return true;
}

/** The models that can stand beside the first; where there are any, one does unless the reader says otherwise. */
function offerSecondModels() {
  const select = byId("second-model");
  const isChosen = select.options.length > 0;
  const before = select.value;
  const others = models.map((model) => model.id).filter((name) => name !== byId("model").value);
  fillSelect(select, others);
  select.append(new Option("no other", NO_MODEL));
  if (others.includes(before) || (isChosen && before === NO_MODEL)) select.value = before;
}

function fillSelect(select, names, otherwise) {
  select.replaceChildren(...names.map((name) => new Option(name, name)));
  select.disabled = names.length === 0;
  if (names.length === 0) select.append(new Option(otherwise, NO_MODEL));
}

function access() {
  return { key: byId("key").value.trim(), limitS: byId("limit").validity.valid ? byId("limit").valueAsNumber : DEFAULT_LIMIT_S };
}

function changeKey() {
  clearProblems();
  return loadModels();
}
