"use strict";
// The text that is ranked: the turns of the prompt, and the answers. The page's fields are its only state.

const MIN_TURNS = 1;
const MIN_ANSWERS = 2;
const turnList = document.getElementById("turns");
const answerList = document.getElementById("answers");
const BLANK = { turns: [{ role: "user", content: "" }], answers: ["", ""] };

/** `{ turns: [{ role, content }], answers: [text] }` */
function readDraft() {
  const turns = [...turnList.children].map((field) => ({ role: roleOf(field).value, content: textOf(field).value }));
  return { turns, answers: [...answerList.children].map((field) => textOf(field).value) };
}

function writeDraft({ turns, answers }) {
  turnList.replaceChildren();
  answerList.replaceChildren();
  turns.forEach((turn) => addTurn(turn));
  answers.forEach((answer) => addAnswer(answer));
}

function isBlank({ turns, answers }) {
  return turns.every((turn) => turn.content === "") && answers.every((answer) => answer === "");
}

function addTurn({ role, content }, place = turnList.children.length) {
  const field = newField("turn-template", content);
  roleOf(field).value = role;
  turnList.insertBefore(field, turnList.children[place] ?? null);
  relabel();
  return field;
}

function addAnswer(content) {
  const field = newField("answer-template", content);
  answerList.append(field);
  relabel();
  return field;
}

/** The role that usually speaks after the last turn. */
function nextRole() {
  return roleOf(turnList.lastElementChild).value === "user" ? "assistant" : "user";
}

/** Remove a field and move on to the one that takes its place. */
function removeField(field) {
  const list = field.parentElement;
  const neighbour = field.nextElementSibling ?? field.previousElementSibling;
  field.remove();
  relabel();
  textOf(neighbour).focus();
  list.dispatchEvent(new Event("input", { bubbles: true }));
}

function emptyField() {
  return [...turnList.children, ...answerList.children].find((field) => textOf(field).value.trim() === "") ?? null;
}

function nameOf(field) {
  const place = [...field.parentElement.children].indexOf(field);
  return field.parentElement === turnList ? `Turn ${place + 1}` : `Answer ${letterOf(place)}`;
}

function newField(template, content) {
  const field = document.getElementById(template).content.firstElementChild.cloneNode(true);
  textOf(field).value = content;
  field.querySelector(".remove").addEventListener("click", () => removeField(field));
  return field;
}

/** Names and ids follow places, which change as fields come and go. */
function relabel() {
  for (const field of [...turnList.children, ...answerList.children]) {
    const name = nameOf(field);
    const id = name.toLowerCase().replace(" ", "-");
    textOf(field).id = id;
    textOf(field).setAttribute("aria-describedby", `${id}-problem`);
    field.querySelector(".problem").id = `${id}-problem`;
    const remove = field.querySelector(".remove");
    remove.setAttribute("aria-label", `Remove ${name.replace("Turn", "turn").replace("Answer", "answer")}`);
    remove.hidden = field.parentElement.children.length <= (field.parentElement === turnList ? MIN_TURNS : MIN_ANSWERS);
    if (field.parentElement === turnList) labelTurn(field, name);
    else labelAnswer(field, id);
  }
  document.getElementById("add-system").hidden = roleOf(turnList.firstElementChild ?? answerList)?.value === "system";
}

function labelTurn(field, name) {
  textOf(field).setAttribute("aria-label", `${name}, ${roleOf(field).value}`);
  roleOf(field).setAttribute("aria-label", `Role of ${name.toLowerCase()}`);
}

function labelAnswer(field, id) {
  field.querySelector("label").htmlFor = id;
  field.querySelector(".letter").textContent = letterOf([...answerList.children].indexOf(field));
}

function textOf(field) {
  return field.querySelector("textarea");
}

function roleOf(field) {
  return field.querySelector(".role");
}
