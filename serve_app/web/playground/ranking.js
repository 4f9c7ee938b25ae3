"use strict";
// Orders and comparisons of scores, as serve_app/reward_model/ranking.py and POST /v1/compare make them.

const LEAST_SPAN = 2; // a lead of 2 wins 88 times in 100

/** The places of `scores`, the best first; equal scores keep their order. */
function bestFirst(scores) {
  return scores.map((_, place) => place).sort((a, b) => scores[b] - scores[a] || a - b);
}

/** How probable it is that an answer ahead by `margin` is preferred: 1 / (1 + e^-margin) (Bradley and Terry, 1952). */
function logistic(margin) {
  return 1 / (1 + Math.exp(-margin));
}

/** Results of POST /v1/score, the best first, each with its lead over the next; the last one leads nobody. */
function standingsOf(results) {
  const places = bestFirst(results.map((result) => result.score));
  return places.map((place, rank) => {
    const standing = { ...results[place], place, rank, next: null, margin: null, probability: null };
    if (rank + 1 < places.length) {
      standing.next = places[rank + 1];
      standing.margin = standing.score - results[standing.next].score;
      standing.probability = logistic(standing.margin);
    }
    return standing;
  });
}

/** How many pairs of answers two models put in the same order, of how many. */
function pairsAlike(first, second) {
  let alike = 0;
  let all = 0;
  for (let a = 0; a < first.length; a++) {
    for (let b = a + 1; b < first.length; b++) {
      all += 1;
      if (Math.sign(first[a] - first[b]) === Math.sign(second[a] - second[b])) alike += 1;
    }
  }
  return { alike, all };
}

/**
 * The length of each score's bar, from 0 to 1: its lead over the lowest score, since a reward means nothing but its
 * difference to others. A lead of `LEAST_SPAN` or less does not fill the bar.
 */
function barLengths(scores) {
  const low = Math.min(...scores);
  const span = Math.max(LEAST_SPAN, Math.max(...scores) - low);
  return scores.map((score) => (score - low) / span);
}
