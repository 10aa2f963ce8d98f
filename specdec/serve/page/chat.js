"use strict";
const DEEPEST = 4, STORED = "specdec.chat", ASIDE = STORED + ".aside", AHEAD = 2000, IDLE_SHARE = 4;
const TAGS = ["p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "ul", "ol", "li", "blockquote", "pre", "code", "em",
  "strong", "del", "a", "table", "thead", "tbody", "tr", "th", "td"];
const FIELDS = {system: "value", tokens: "value", temperature: "value", plain: "checked", colour: "checked"};
const at = (id) => document.getElementById(id);
// A turn: {role, text}; of the assistant also thoughts, runs ([position in the draft, text]), figures and plain.
// Figures: {count, steps, seconds} of its tokens, and finish: null until it has ended.
let turns = [], model = "", running = null;

function make(tag, more = {}, ...inside) {
  const made = Object.assign(document.createElement(tag), more);
  made.append(...inside);
  return made;
}

function button(text, act) {
  return make("button", {type: "button", className: "quiet-button", textContent: text, onclick: act});
}

// --- what the browser keeps ---

function keep() {
  const fields = Object.fromEntries(Object.entries(FIELDS).map(([id, kind]) => [id, at(id)[kind]]));
  try { localStorage.setItem(STORED, JSON.stringify({turns, fields})); } catch { /* full, or forbidden */ }
}

function recall(text) {
  const stored = JSON.parse(text), usable = ({role, text, runs}) => typeof text === "string" && (role === "user" || Array.isArray(runs));
  for (const [id, kind] of Object.entries(FIELDS)) at(id)[kind] = stored.fields[id] ?? at(id)[kind];
  turns = stored.turns.filter(usable);
  for (const turn of turns) if (typeof turn.figures?.steps !== "number") turn.figures = null;
}

// Show the stored conversation, from its end. One that cannot be shown is set aside, so that the page works.
function reopen() {
  let text = null;
  try { text = localStorage.getItem(STORED); } catch { /* forbidden */ }
  try {
    if (text !== null) recall(text);
    show();
    if (turns.length) scrollTo(0, document.documentElement.scrollHeight);
  } catch {
    turns = [];
    show();
    try { localStorage.setItem(ASIDE, text); } catch { /* full */ }
    keep();
    at("error").textContent = "The stored conversation cannot be shown; the browser keeps it as " + ASIDE + ".";
  }
}

// --- an answer's text ---

const plainHtml = (text) => text.replace(/[&<>]/g, (c) => ({"&": "&amp;", "<": "&lt;", ">": "&gt;"}[c]));
marked.use({gfm: true, breaks: true, renderer: {
  html: ({text, block}) => block ? `<p>${plainHtml(text)}</p>` : plainHtml(text), // a model's HTML is text
  image: ({text}) => plainHtml(text), // nothing is fetched
}});

function fromMarkdown(text) {
  const clean = {ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ["href", "start", "class"], RETURN_DOM_FRAGMENT: true};
  const found = DOMPurify.sanitize(marked.parse(text), clean);
  for (const link of found.querySelectorAll("a")) Object.assign(link, {target: "_blank", rel: "noopener noreferrer"});
  for (const block of found.querySelectorAll("pre")) {
    const code = block.textContent, name = (block.firstElementChild?.className || "").replace("language-", "");
    const copy = button("Copy code", () => copied(copy, code));
    const made = [...codeParts(code, name)].map(([kind, part]) => kind ? make("span", {className: kind}, part) : part);
    (block.firstElementChild || block).replaceChildren(...made);
    const frame = make("div", {className: "code"}, make("div", {className: "row"}, make("span", {textContent: name}), copy));
    block.replaceWith(frame);
    block.tabIndex = 0; // scrolled with the keyboard
    frame.append(block);
  }
  return found;
}

// The element of a text, coloured by its `runs` if they are given. Markdown that cannot be read (3,000 nested quotes) is shown as it is.
function rendered(text, runs) {
  const found = make("div", {className: "text markdown"});
  try {
    found.append(fromMarkdown(text));
    if (runs) colour(found, runs);
  } catch {
    found.className = "text as-is";
    found.textContent = text;
  }
  return found;
}

// Colour what was drafted. What is shown is the source less its marks: each letter is the next such one in the source.
function colour(shown, runs) {
  const source = runs.map(([, text]) => text).join(""), depths = runs.flatMap(([depth, text]) => Array(text.length).fill(depth));
  const walker = document.createTreeWalker(shown, NodeFilter.SHOW_TEXT), nodes = [];
  while (walker.nextNode()) {
    const around = walker.currentNode.parentElement;
    const between = around === shown || around.matches("table, thead, tbody, tr, ul, ol"); // blocks: white space only
    if (!between && !around.closest(".code > .row")) nodes.push(walker.currentNode);
  }
  let place = 0, depth = 0;
  for (const node of nodes) {
    const parts = document.createDocumentFragment();
    let part = "", of = null;
    const close = () => part && parts.append(of ? make("span", {className: "d" + Math.min(of, DEEPEST)}, part) : part);
    for (const letter of node.data.split("")) {
      const blank = /\s/.test(letter), found = blank ? (source[place] === letter ? place : -1) : source.indexOf(letter, place);
      if (found >= 0 && found < place + AHEAD) { depth = depths[found]; place = found + 1; }
      if (depth !== of) { close(); part = ""; of = depth; }
      part += letter;
    }
    close();
    node.replaceWith(parts);
  }
}

function copied(where, text) {
  const done = () => { where.textContent = "Copied"; at("status").textContent = "Copied."; };
  if (navigator.clipboard) return navigator.clipboard.writeText(text).then(done, () => {});
  const field = make("textarea", {value: text, className: "unseen"}); // pages of other machines have no clipboard
  document.body.append(field);
  field.select();
  if (document.execCommand("copy")) done();
  field.remove();
  where.focus();
}

// --- the conversation ---

function figure(name, value) {
  return make("span", {}, name + " ", make("b", {textContent: value}));
}

const number = (value, digits = 1) => value === null || value === undefined ? "–" : value.toFixed(digits);

const rateOf = ({count, seconds}) => seconds ? count / seconds : null;
const lengthOf = ({count, steps}) => steps ? count / steps : null;

function figuresOf(answer, drafted = false) {
  const {count, finish} = answer.figures;
  const row = make("p", {className: "figures"});
  if (drafted) row.append(figure("Mean acceptance length", number(lengthOf(answer.figures), 2)));
  row.append(figure("Tokens/s", number(rateOf(answer.figures))), figure("Tokens", count));
  if (finish === "length") row.append("ended at the limit of new tokens");
  if (finish === "stopped") row.append("stopped");
  return row;
}

function answered(turn) {
  const whole = make("section", {className: "drafted"});
  if (turn.plain) whole.append(make("h2", {textContent: "Drafter: " + turn.drafter}));
  if (turn.thoughts) whole.append(make("details", {className: "thoughts", open: !turn.text},
    make("summary", {textContent: "Reasoning"}), make("div", {textContent: turn.thoughts})));
  whole.append(rendered(turn.text, turn.runs));
  if (turn.figures?.finish) whole.append(figuresOf(turn, true));
  if (!turn.plain) return whole;
  const plain = make("section", {className: "plain"}, make("h2", {textContent: "Plain decoding"}),
    rendered(turn.plain.text));
  if (turn.plain.figures?.finish) {
    const row = figuresOf(turn.plain), [rate, drafted] = [turn.plain, turn].map((each) => rateOf(each.figures));
    const complete = turn.plain.figures.finish !== "stopped";
    if (rate && drafted) row.append(figure("Speedup", number(drafted / rate, 2) + " ×"));
    if (complete) row.append(figure("Same text", turn.plain.text === turn.text ? "yes" : "no"));
    plain.append(row);
  }
  return make("div", {className: "answers"}, whole, plain);
}

function actions(turn, place) {
  const row = make("div", {className: "row"}), last = place === turns.length - 1;
  if (turn.role === "user") row.append(button("Edit", () => edit(place)));
  else row.append(button("Copy", (event) => copied(event.target, turn.text)));
  if (turn.role === "assistant" || last) row.append(button("Retry", () => retry(turn.role === "user" ? place : place - 1)));
  if (last && turn.text && turn.figures?.finish === "length") row.append(button("Continue", () => go(true)));
  return row;
}

// The element of turn number `place`, without buttons while it is written.
function shown(place, busy = false) {
  const turn = turns[place];
  const label = turn.role === "user" ? "You" : "Answer";
  const made = make("article", {className: turn.role, ariaLabel: label});
  made.append(turn.role === "user" ? make("div", {className: "text", textContent: turn.text}) : answered(turn));
  if (busy) made.setAttribute("aria-busy", "true");
  else made.append(actions(turn, place));
  return made;
}

function show() {
  const empty = make("p", {className: "empty", textContent: "Write a message to begin. The conversation stays in this browser."});
  at("log").replaceChildren(...(turns.length ? turns.map((_, place) => shown(place)) : [empty]));
  legend();
  for (const found of at("log").querySelectorAll("button")) found.disabled = running !== null;
}

function legend() {
  document.body.classList.toggle("uncoloured", !at("colour").checked);
  at("legend").hidden = !at("colour").checked || !turns.length;
}

// Change the page; who read its end goes on reading its end.
function following(change) {
  const end = () => document.documentElement.scrollHeight;
  const low = innerHeight + scrollY > end() - 80;
  change();
  if (low) scrollTo(0, end());
}

// Show the last turn anew, at most in a part of the time, so that long answers stay smooth.
let drawn = 0, cost = 0, planned = null;
function showLast() {
  if (planned) return;
  planned = setTimeout(() => {
    planned = null;
    if (!running) return;
    const open = at("log").lastElementChild.querySelector(".thoughts")?.open;
    const begun = performance.now(), made = shown(turns.length - 1, true);
    if (open !== undefined && made.querySelector(".thoughts")) made.querySelector(".thoughts").open = open;
    following(() => at("log").lastElementChild.replaceWith(made));
    drawn = performance.now();
    cost = drawn - begun;
  }, Math.max(0, drawn + Math.max(16, IDLE_SHARE * cost) - performance.now()));
}

function edit(place) {
  const article = at("log").children[place], field = make("textarea", {value: turns[place].text, required: true, ariaLabel: "Edit message"});
  const done = () => { show(); at("log").children[place].querySelector("button").focus(); };
  const form = make("form", {}, field, make("div", {className: "row"}, button("Cancel", done),
    make("button", {type: "submit", textContent: "Send again"})));
  form.onsubmit = (event) => {
    event.preventDefault();
    if (!valid()) return;
    turns[place].text = field.value;
    at("message").focus();
    retry(place);
  };
  field.onkeydown = (event) => {
    if (event.key === "Escape") { event.stopPropagation(); done(); }
    else sendWithEnter(event, form);
  };
  field.oninput = () => fit(field);
  article.replaceChildren(form);
  fit(field);
  field.focus();
}

// Answer the message number `place` again; what came after it is gone.
function retry(place) {
  if (!valid()) return;
  turns.length = place + 1;
  go();
}

// --- the server ---

function headers() {
  const key = at("key").value;
  return key ? {Authorization: "Bearer " + key} : {};
}

async function refusal(response) {
  try { return (await response.json()).error.message; } catch { return "the server answers with " + response.status; }
}

// The browser's own words for a server that is not there say nothing.
function gone(error) {
  throw error.name === "AbortError" ? error : new Error("The server does not answer, or the connection was lost; check that the server runs.");
}

async function findModel() {
  const response = await fetch("v1/models", {headers: headers()}).catch(gone);
  if (!response.ok) throw new Error(await refusal(response));
  model = (await response.json()).data[0].id;
  at("model").textContent = model;
}

// The objects of a stream of server-sent events.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const {value, done} = await reader.read().catch(gone);
    if (done) return;
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) if (part !== "data: [DONE]") yield JSON.parse(part.slice("data: ".length));
  }
}

// Stream an answer to the end of `turn`, which has its text and figures even if this fails or is stopped.
async function stream(body, turn) {
  const before = turn.figures || {count: 0, steps: 0, seconds: 0}, own = {count: 0, steps: 0, seconds: 0};
  const figured = (finish) => {
    turn.figures = {finish};
    for (const key of ["count", "steps", "seconds"]) turn.figures[key] = before[key] + own[key];
  };
  const response = await fetch("v1/chat/completions", {
    method: "POST", signal: running.signal, body: JSON.stringify(body),
    headers: {"Content-Type": "application/json", ...headers()},
  }).catch(gone);
  if (!response.ok) throw new Error(await refusal(response));
  turn.drafter = response.headers.get("X-Specdec-Drafter");
  let finish = null, end = null, first = 0;
  for await (const chunk of events(response)) {
    if (chunk.error) throw new Error(chunk.error.message);
    for (const choice of chunk.choices) {
      const thought = choice.delta.reasoning_content || "";
      turn.thoughts += thought;
      const piece = choice.delta.content || "", depth = choice.draft_depth || 0, last = turn.runs.at(-1);
      if (piece && last && last[0] === depth) last[1] += piece;
      else if (piece) turn.runs.push([depth, piece]);
      turn.text += piece;
      finish = choice.finish_reason || finish;
      if (piece || thought) { // a token
        first ||= performance.now();
        own.count += 1;
        own.steps += depth === 0;
        own.seconds = (performance.now() - first) / 1000;
      }
    }
    figured(null);
    if (chunk.metrics) end = chunk;
    showLast();
  }
  if (!end) gone({});
  const rate = end.metrics.tokens_per_second, length = end.metrics.speculative_decoding?.mean_acceptance_length;
  own.count = end.usage.completion_tokens;
  own.steps = length ? own.count / length : 0;
  own.seconds = rate ? own.count / rate : 0;
  figured(finish);
}

const fresh = () => ({role: "assistant", text: "", thoughts: "", runs: [], drafter: "", figures: null, plain: null});

// Stream an answer to the turns before the last one into `answer`, or go on with it. more: further members of the body.
async function ask(answer, more) {
  const system = at("system").value.trim();
  const messages = turns.slice(0, -1).map(({role, text}) => ({role, content: text}));
  if (system) messages.unshift({role: "system", content: system});
  if (answer.text) messages.push({role: "assistant", content: answer.text, ...(answer.thoughts && {reasoning_content: answer.thoughts})});
  await stream({
    model, messages, max_tokens: Number(at("tokens").value), temperature: Number(at("temperature").value), stream: true,
    stream_options: {include_usage: true, include_draft_depth: true}, ...more,
    ...(answer.text && {continue_final_message: true, add_generation_prompt: false}),
  }, answer);
}

// Answer the last turn, which is the user's, or go on with the answer that it is.
async function answer(going) {
  if (!going) turns.push(fresh());
  const turn = turns.at(-1), seed = Math.floor(Math.random() * 2 ** 31), compare = at("plain").checked && (!going || turn.plain !== null);
  if (!compare) turn.plain = null;
  at("log").children[turns.length - 1]?.remove();
  at("log").append(shown(turns.length - 1, true));
  scrollTo(0, document.documentElement.scrollHeight);
  at("status").textContent = "Generating.";
  await ask(turn, {seed});
  let summary = `Done: ${number(lengthOf(turn.figures), 2)} tokens a step, ${number(rateOf(turn.figures))} tokens per second.`;
  if (compare) {
    at("status").textContent = "Decoding plainly.";
    turn.plain ??= fresh();
    await ask(turn.plain, {seed, num_speculative_tokens: 0});
    const same = turn.plain.text === turn.text ? "yes" : "no";
    summary += ` Plain decoding: ${number(rateOf(turn.plain.figures))} tokens per second. Same text: ${same}.`;
  }
  at("status").textContent = summary;
}

// Answer the last turn, which is the user's. going: it is an answer, which goes on.
async function go(going = false) {
  if (running || !valid()) return;
  running = new AbortController();
  at("send").hidden = true;
  at("stop").hidden = false;
  at("new").disabled = true;
  at("error").textContent = "";
  try {
    show();
    if (!model) await findModel();
    await answer(going);
  } catch (error) {
    const stopped = error.name === "AbortError", turn = turns.at(-1);
    at("status").textContent = stopped ? "Stopped." : "";
    if (!stopped) at("error").textContent = error.message;
    if (turn.role === "assistant" && !turn.text && !turn.thoughts) turns.pop();
    for (const {figures} of [turn, turn.plain || {}]) if (figures) figures.finish ??= "stopped";
  } finally {
    running = null;
    at("send").hidden = false;
    at("stop").hidden = true;
    at("new").disabled = false;
    keep();
    following(show);
  }
}

// --- fields and keys ---

// Whether the numbers of the settings can be used; if not, the form says so.
function valid() {
  const wrong = ["tokens", "temperature"].map(at).find((field) => !field.checkValidity());
  if (wrong) {
    at("settings").open = true;
    wrong.reportValidity();
  }
  return !wrong;
}

function fit(field) {
  field.rows = 1; // no style attribute: the page's policy forbids them
  while (field.rows < 16 && field.scrollHeight > field.clientHeight + 2) field.rows += 1;
}

function sendWithEnter(event, form) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
}

at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running || !at("message").value.trim() || !valid()) return;
  turns.push({role: "user", text: at("message").value});
  at("message").value = "";
  fit(at("message"));
  go();
});
at("message").addEventListener("keydown", (event) => sendWithEnter(event, at("form")));
at("message").addEventListener("input", () => fit(at("message")));
at("stop").addEventListener("click", () => { running?.abort(); at("message").focus(); });
at("new").addEventListener("click", () => {
  turns = [];
  at("error").textContent = at("status").textContent = "";
  show();
  keep();
  at("message").focus();
});
for (const id of Object.keys(FIELDS)) at(id).addEventListener("change", () => { keep(); legend(); });
at("key").addEventListener("change", () => {
  if (model) return;
  at("error").textContent = "";
  begin();
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
addEventListener("pagehide", () => { if (running) keep(); });

function begin() {
  findModel().catch((error) => { at("model").textContent = "unknown"; at("error").textContent = error.message; });
}

history.scrollRestoration = "manual"; // a conversation opens at its end
reopen();
begin();
at("message").focus({preventScroll: true});
