"use strict";
// Colours of code: comments, strings, numbers, keywords and names that are called. It knows words, and no grammar.
const WORDS = {
  hash: "and as assert async await break case class continue def del do done elif else end esac except export False fi finally for from " +
    "function global if import in is lambda local match module None nonlocal not or pass raise rescue return self then True try unless until " +
    "while with yield echo true false null",
  slash: "abstract as async await auto bool boolean break case catch chan char class const constexpr continue crate debugger default defer " +
    "delete do double dyn else enum export extends extern false final finally float fn for from func function go if impl implements import in " +
    "inline instanceof int interface let long loop match mod move mut namespace new nil null nullptr of operator override package private " +
    "protected pub public range ref return self short signed sizeof static str string struct super switch template this throw throws trait true " +
    "try type typedef typename typeof undefined union unsafe unsigned use using val var virtual void volatile where while yield",
  dash: "add all alter and as asc begin between by case column commit constraint create default delete desc distinct do drop else elseif end " +
    "exists false for foreign from full function group having if in index inner insert into is join key left like limit local nil not null of " +
    "offset on or order outer primary references repeat return right rollback select set table then true union unique until update values view " +
    "when where while with",
};
const COMMENTS = {hash: /(?<!\S)#.*/, slash: /\/\/.*|\/\*[^]*?(?:\*\/|$)/, dash: /--.*/, block: /\/\*[^]*?(?:\*\/|$)/, markup: /<!--[^]*?(?:-->|$)/};
const LANGUAGES = {
  hash: "python py bash sh shell zsh yaml yml toml ruby rb perl r makefile dockerfile ini",
  slash: "javascript js jsx typescript ts tsx json jsonc c h cpp c++ cc hpp java go rust rs kotlin kt swift csharp cs php scala dart zig proto",
  dash: "sql lua haskell hs",
  block: "css scss less",
  markup: "html xml svg vue",
};
const STRING = /(?<quote>"""|''')[^]*?(?:\k<quote>|$)|"(?:\\.|[^"\\\n])*"?|(?<!\w)'(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*`/;
const RUST_STRING = /"(?:\\.|[^"\\])*"?|'(?:\\[^']+|[^'\\\n])'/; // 'a is a lifetime
const OTHERS = {
  number: /\b(?:0x[\da-f_]+|\d[\d_]*(?:\.\d+)?(?:e[+-]?\d+)?)\w*/i,
  called: /[A-Za-z_$][\w$]*(?=\()/,
  name: /[A-Za-z_$][\w$]*/,
};
const FAMILIES = new Map(Object.entries(LANGUAGES).flatMap(([family, names]) => names.split(" ").map((name) => [name, family])));
const KEYWORDS = new Map(Object.entries(WORDS).map(([family, words]) => [family, new Set(words.split(" "))]));

// The parts of code in a language, [kind, text]; the kind of what has no colour is "".
function* codeParts(code, language) {
  const family = FAMILIES.get(language.toLowerCase());
  if (!family) return yield ["", code];
  const string = /^(rust|rs)$/i.test(language) ? RUST_STRING : STRING;
  const kinds = {comment: COMMENTS[family], string, ...(family === "markup" ? {keyword: /<\/?[\w:-]+|\/?>/} : OTHERS)};
  const pattern = new RegExp(Object.entries(kinds).map(([kind, {source}]) => `(?<${kind}>${source})`).join("|"), "g");
  const known = (word) => KEYWORDS.get(family)?.has(family === "dash" ? word.toLowerCase() : word);
  let place = 0;
  for (const {0: text, index, groups} of code.matchAll(pattern)) {
    let kind = Object.keys(kinds).find((each) => groups[each] !== undefined);
    if (kind === "called" || kind === "name") kind = known(text) ? "keyword" : kind === "called" ? "called" : "";
    if (!kind) continue;
    if (index > place) yield ["", code.slice(place, index)];
    yield [kind, text];
    place = index + text.length;
  }
  if (place < code.length) yield ["", code.slice(place)];
}
