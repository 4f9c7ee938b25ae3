"use strict";
// Numbers and failures as people read them.

const LEAST_SHOWN = 0.0001;
const EMBEDDED_NOTE = "tiny: a toy model that knows arithmetic, counting, ordering, reversing, spelling, odd one out, " +
  "capitals, colours, opposites, units, finishing, format, topic, repeating, politeness, secret; not for real use";

function letterOf(place) {
  const last = String.fromCharCode(65 + (place % 26));
  return place < 26 ? last : letterOf(Math.floor(place / 26) - 1) + last;
}

function ordinal(rank) {
  const number = rank + 1;
  const isTeen = number % 100 >= 11 && number % 100 <= 13;
  return number + ((!isTeen && { 1: "st", 2: "nd", 3: "rd" }[number % 10]) || "th");
}

function scoreText(score) {
  return score.toFixed(4).replace("-", "\u2212");
}

function percent(probability) {
  return probability > 0.9995 ? "over 99.9\u00a0%" : `${(100 * probability).toFixed(1)}\u00a0%`;
}

function leadText(standing) {
  const next = letterOf(standing.next);
  if (standing.margin === 0) return `level with ${next}: the scores are equal`;
  const margin = standing.margin < LEAST_SHOWN ? `less than ${LEAST_SHOWN}` : standing.margin.toFixed(4);
  return `${margin} ahead, ${percent(standing.probability)} likely to beat ${next}`;
}

function counted(number, noun) {
  return `${number.toLocaleString("en")} ${noun}${number === 1 ? "" : "s"}`;
}

/** What one model says, in a sentence. */
function verdict(standings) {
  const [best] = standings;
  if (best.margin === 0) return `Answers ${letterOf(best.place)} and ${letterOf(best.next)} share the first place.`;
  return `Answer ${letterOf(best.place)} is the best, ${percent(best.probability)} likely to beat ${letterOf(best.next)}.`;
}

/** What two models say together. */
function jointVerdict([first, second]) {
  const winners = [first, second].map((outcome) => letterOf(bestFirst(outcome.scores)[0]));
  const { alike, all } = pairsAlike(first.scores, second.scores);
  const best =
    winners[0] === winners[1]
      ? `Both models put answer ${winners[0]} first.`
      : `${first.model} puts answer ${winners[0]} first, ${second.model} answer ${winners[1]}.`;
  return alike === all ? `${best} They agree on the whole order.` : `${best} They agree on ${alike} of ${counted(all, "pair")}.`;
}

/**
 * A failure in words, and the field that it is about: `key`, `{ turn }`, `{ answer }` (places) or null.
 * `numTurns` is the length of the prompt, `hasKey` whether a key was sent.
 */
function inWords(failure, { numTurns, hasKey, limitS }) {
  switch (failure.status) {
    case "unreachable":
      return { text: "The server does not answer: it has stopped, or the network is gone. Your text is still here; try again.", field: null };
    case "timeout":
    case 408:
      return { text: `No answer within ${counted(limitS, "second")}. Try again, or allow more time under Options.`, field: null };
    case "unreadable":
      return { text: "The answer cannot be read. Is this server rayward, and of one version with this page?", field: null };
    case "bad key":
      return { text: "An API key has no spaces and no letters beyond ASCII.", field: "key" };
    case 401:
      return { text: hasKey ? "The server does not know this API key." : "This server asks for an API key.", field: "key" };
    case 403:
      return { text: "Without API keys the server answers its own machine only. Open this page there, or give the server keys.", field: null };
    case 404:
      return { text: `${failure.message}. The list of models has been read again.`, field: null };
    case 413:
      return { text: "This is too much text for one request (32 MiB): shorten it, or rank fewer answers at once.", field: null };
    case 422:
      return refusal(failure, numTurns);
    case 503:
      return { text: overload(failure), field: null };
    default:
      return { text: `The server failed (${failure.status}): ${failure.message}.`, field: null };
  }
}

function refusal(failure, numTurns) {
  const place = /^conversations\[(\d+)\](?:\[(\d+)\])?/.exec(failure.param ?? "");
  if (place === null) return { text: failure.param ? `${failure.param}: ${failure.message}` : failure.message, field: null };
  const [answer, turn] = [Number(place[1]), Number(place[2])];
  if (place[2] !== undefined && turn < numTurns) return { text: `Turn ${turn + 1}: ${failure.message}`, field: { turn } };
  const name = `answer ${letterOf(answer)}`;
  if (failure.code === "context_length_exceeded") {
    const [fact] = failure.message.split(";"); // what follows speaks of the API's options
    return { text: `Prompt and ${name} are too long: ${fact}. Shorten them, or choose under Options what to cut.`, field: { answer } };
  }
  return { text: `No score for ${name}: ${failure.message}`, field: { answer } };
}

function overload(failure) {
  const reason = failure.code === "overloaded" ? "The server is busy" : "The server cannot answer just now";
  const when = failure.retryAfterS ? `in about ${counted(failure.retryAfterS, "second")}` : "in a while";
  return `${reason}: ${failure.message}. Try again ${when}.`;
}
