// A little Markdown as elements. What a model says is never read as HTML: it only becomes text inside of elements that
// are made here.

const make = (name, ...children) => {
  const element = document.createElement(name);
  element.append(...children);
  return element;
};

const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*|\*([^*\s][^*\n]*)\*|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/;

function inline(text) {
  const parts = [];
  for (let found = INLINE.exec(text); found; found = INLINE.exec(text)) {
    parts.push(text.slice(0, found.index));
    if (found[1] !== undefined) parts.push(make("code", found[1]));
    else if (found[2] !== undefined) parts.push(make("strong", found[2]));
    else if (found[3] !== undefined) parts.push(make("em", found[3]));
    else {
      const link = make("a", found[4]);
      link.href = found[5];
      link.rel = "noopener noreferrer nofollow";
      link.target = "_blank";
      link.title = found[5];
      parts.push(link);
    }
    text = text.slice(found.index + found[0].length);
  }
  parts.push(text);
  return parts;
}

function blocks(text) {
  const elements = [];
  let list = null;
  let lines = [];
  const flush = () => {
    if (lines.length) elements.push(make("p", ...inline(lines.join("\n"))));
    lines = [];
  };
  for (const line of text.split("\n")) {
    const item = /^\s*(?:[-*+]|(\d+)[.)])\s+(.*)$/.exec(line);
    const heading = /^(#{1,6})\s+(.*)$/.exec(line);
    if (!item) list = null;
    if (item || heading || !line.trim()) flush();
    if (item) {
      const kind = item[1] === undefined ? "UL" : "OL";
      if (!list || list.tagName !== kind) elements.push((list = make(kind.toLowerCase())));
      list.append(make("li", ...inline(item[2])));
    } else if (heading) elements.push(make("p", make("strong", ...inline(heading[2]))));
    else if (line.trim()) lines.push(line);
  }
  flush();
  return elements;
}

export function rendered(text) {
  const elements = [];
  const parts = text.split(/^```[^\n]*\n?/m);
  parts.forEach((part, index) => {
    if (index % 2) elements.push(make("pre", make("code", part.replace(/\n$/, ""))));
    else elements.push(...blocks(part));
  });
  return elements;
}
