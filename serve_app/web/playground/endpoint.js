"use strict";
// What the page asks of the endpoint it came from.

// The page gives up at its limit; the server, which a broken line may not tell, a little later. Not the other way round:
// browsers send a request again that is answered with 408.
const GRACE_S = 5;

/** Why there is no answer. `status` is the HTTP status, or unreachable, timeout, stopped, unreadable or bad key. */
class Failure extends Error {
  constructor(status, { message = "", code = null, param = null, retryAfterS = null } = {}) {
    super(message);
    Object.assign(this, { status, code, param, retryAfterS });
  }
}

/** The models served, the default first: `{ id, max_tokens }`. */
async function fetchModels({ key, limitS }) {
  const answer = await ask("v1/models", { key, limitS });
  const isList = Array.isArray(answer.data) && answer.data.every((model) => typeof model.id === "string");
  if (!isList || answer.data.length === 0) throw new Failure("unreadable");
  return answer.data;
}

/** One `{ score, num_tokens, truncated }` for each answer, in order. */
async function fetchScores(body, { key, limitS, signal }) {
  const { results } = await ask("v1/score", { key, limitS, signal, body });
  const fits = Array.isArray(results) && results.length === body.conversations.length;
  if (!fits || !results.every((result) => Number.isFinite(result.score))) throw new Failure("unreadable");
  return results;
}

async function ask(path, { key, limitS, signal, body }) {
  const timeout = AbortSignal.timeout(limitS * 1000);
  const options = { headers: headersOf(key, limitS), cache: "no-store" };
  options.signal = signal ? AbortSignal.any([signal, timeout]) : timeout;
  if (body) {
    options.method = "POST";
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  let response, text;
  try {
    response = await fetch(path, options);
    text = await response.text();
  } catch {
    if (signal?.aborted) throw new Failure("stopped");
    throw new Failure(timeout.aborted ? "timeout" : "unreachable");
  }
  return readAnswer(response, text);
}

function headersOf(key, limitS) {
  if (!/^[\x21-\x7e]*$/.test(key)) throw new Failure("bad key"); // fetch would refuse it without a word
  const headers = { "X-Request-Timeout-S": String(limitS + GRACE_S) };
  return key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
}

function readAnswer(response, text) {
  let answer = null;
  try {
    answer = JSON.parse(text);
  } catch {
    // A gateway's page of an error; its status says enough.
  }
  if (response.ok && answer !== null && typeof answer === "object") return answer;
  if (response.ok) throw new Failure("unreadable");
  const { message = response.statusText || "no reason given", code, param } = answer?.error ?? {};
  const retryAfter = Number.parseInt(response.headers.get("Retry-After") ?? "", 10);
  throw new Failure(response.status, { message, code, param, retryAfterS: retryAfter > 0 ? retryAfter : null });
}

/** The request as a command for a POSIX shell; the key stays out of it. */
function curlCommand(body, hasKey) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const lines = [`curl ${quoted(new URL("v1/score", location.href).href)}`, "-H 'Content-Type: application/json'"];
  if (hasKey) lines.push('-H "Authorization: Bearer $RAYWARD_API_KEY"');
  return [...lines, `-d ${quoted(JSON.stringify(body))}`].join(" \\\n  ");
}
