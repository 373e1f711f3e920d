// Text -> ids, as tokens.py: CLIP's byte-level BPE or BERT's WordPiece, by pipeline.json's "tokenizers".

export async function get(path, kind) {
  const answer = await fetch(path);
  if (!answer.ok) throw new Error(`${path}: ${answer.status} ${answer.statusText}`);
  return answer[kind]();
}

// r: an entry of "tokenizers" -> a function from texts to { ids, mask }, two lists of rows
export async function makeTokenizer(r) {
  if (r.rules === "openai") throw new Error("this page does not read texts by OpenAI's rules; runner.py does");
  const idsOfWords = r.kind === "bpe" ? await bpe(r) : await wordpiece(r);
  const clean = r.kind === "bpe" ? cleanBpe : text => cleanBert(text, r);
  const row = text => {
    const ids = splitAt(text, r.added).flatMap((part, i) => i % 2 ? [r.added[part]] :
      splitAt(clean(part), r.cleaned).flatMap((bit, j) => j % 2 ? [r.cleaned[bit]] : idsOfWords(bit)));
    return [r.start, ...ids.slice(0, r.length - 2), r.end];
  };
  return texts => {
    const rows = texts.map(row), length = r.fill ? r.length : Math.max(...rows.map(x => x.length));
    const filled = (x, value) => [...x, ...Array(length - x.length).fill(value)];
    return { ids: rows.map(x => filled(x, r.pad)), mask: rows.map(x => filled(x.map(() => 1), 0)) };
  };
}

// text, token, text, token, ...: the longest token where several begin
function splitAt(text, tokens) {
  const longest = Object.keys(tokens).sort((a, b) => b.length - a.length);
  const escaped = longest.map(token => token.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
  return longest.length ? text.split(new RegExp(`(${escaped.join("|")})`)) : [text];
}

const SPACE = /[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]+/g;
const lower = text => [...text.replaceAll("Σ", "σ")].map(c => c.toLowerCase()).join("");
const cleanBpe = text => lower(text.normalize("NFC").replace(SPACE, " "));

async function bpe(r) {
  const vocab = await get(`${r.folder}/vocab.json`, "json");
  const lines = (await get(`${r.folder}/merges.txt`, "text")).split("\n");
  const ranks = new Map(lines.filter(l => l && !l.startsWith("#version")).map((line, i) => [line, i]));
  const symbols = [];
  for (let b = 0, next = 256; b < 256; b++)
    symbols[b] = String.fromCharCode((b > 32 && b < 127) || (b > 160 && b !== 173) ? b : next++);
  const pattern = /<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/gu;
  const words = text => (text.match(pattern) ?? []).flatMap(w => w in r.special ? w.match(/\w+|\W+/g) : [w]);
  const spell = word => [...new TextEncoder().encode(word)].map((b, i, all) =>
    symbols[b] + (i + 1 === all.length ? "</w>" : ""));
  return text => words(text).flatMap(word => joined(spell(word), ranks)).map(s => vocab[s] ?? r.unknown);
}

// joins the pair that was learned first, wherever it stands, until no neighbours are a pair
function joined(parts, ranks) {
  for (;;) {
    let best = Infinity, pair = null;
    for (let i = 0; i + 1 < parts.length; i++) {
      const rank = ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
      if (rank < best) [best, pair] = [rank, [parts[i], parts[i + 1]]];
    }
    if (!pair) return parts;
    const merged = [];
    for (let i = 0; i < parts.length; i++)
      if (parts[i] === pair[0] && parts[i + 1] === pair[1]) merged.push(parts[i] + parts[++i]);
      else merged.push(parts[i]);
    parts = merged;
  }
}

const HAN = new RegExp("[\u4e00-\u9fff\u3400-\u4dbf\u{20000}-\u{2a6df}\u{2a700}-\u{2b73f}\u{2b740}-\u{2b81f}" +
                       "\u{2b920}-\u{2ceaf}\uf900-\ufaff\u{2f800}-\u{2fa1f}]", "gu");
const MARK = /[!-/:-@[-`{-~]|\p{P}/gu;

function cleanBert(text, r) {
  text = text.replace(/(?![\t\n\r])[\0\ufffd\p{C}]/gu, "").replace(SPACE, " ").replace(HAN, " $& ");
  if (r.strip_accents) text = text.normalize("NFD").replace(/\p{Mn}/gu, "");
  return r.lower ? lower(text) : text;
}

async function wordpiece(r) {
  const lines = (await get(`${r.folder}/vocab.txt`, "text")).split("\n");
  const vocab = new Map(lines.map((line, i) => [line.replace(/\r$/, ""), i]));
  const idsOf = word => {
    const letters = [...word], ids = [];
    for (let start = 0, end; start < letters.length && letters.length <= 100; start = end) {
      const piece = e => (start ? "##" : "") + letters.slice(start, e).join("");
      for (end = letters.length; end > start && !vocab.has(piece(end));) end--;
      if (end === start) return [r.unknown];
      ids.push(vocab.get(piece(end)));
    }
    return ids.length ? ids : [r.unknown];
  };
  return text => text.replace(MARK, " $& ").split(SPACE).filter(Boolean).flatMap(idsOf);
}
