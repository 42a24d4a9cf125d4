// What the page asks of the server: OpenAI's interface, conversations, the swarm.

const KEY = "corolla-key";

// `ask`: whether the person is asked for a key where one is needed.
async function asked(path, options = {}, ask = true) {
  const headers = { ...(options.headers || {}) };
  const key = localStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  if (options.body !== undefined) headers["Content-Type"] = "application/json";
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401 && ask) {
    const given = prompt("This server asks for a key:");
    if (given) {
      localStorage.setItem(KEY, given.trim());
      return asked(path, options);
    }
  }
  if (!answer.ok) {
    const about = await answer.json().catch(() => null);
    throw new Error(about?.error?.message || `The server answered ${answer.status}.`);
  }
  return answer;
}

export const get = async (path, ask = true) => (await asked(path, {}, ask)).json();
export const text = async (path) => (await asked(path)).text();
export const send = async (method, path, body) =>
  (await asked(path, { method, body: body === undefined ? undefined : JSON.stringify(body) })).json();

export function download(name, content, type = "application/json") {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content], { type }));
  link.download = name;
  link.click();
  URL.revokeObjectURL(link.href);
}

// A link brings no key along: where one is needed, what it leads to is fetched and kept as a file.
export const keyed = () => Boolean(localStorage.getItem(KEY));

// The events of a stream, as objects.
export async function* events(path, options) {
  const reader = (await asked(path, options)).body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      waiting += value;
      const parts = waiting.split("\n\n");
      waiting = parts.pop();
      for (const part of parts) {
        const line = part.split("\n").find((one) => one.startsWith("data: "));
        if (!line) continue;
        if (line === "data: [DONE]") return;
        const found = JSON.parse(line.slice(6));
        if (found.error) throw new Error(found.error.message);
        yield found;
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

export function reply(body, signal) {
  return events("/v1/chat/completions", {
    method: "POST",
    body: JSON.stringify({ ...body, stream: true }),
    signal,
  });
}
