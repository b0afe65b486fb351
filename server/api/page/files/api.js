// The server's API, as every client has it. Addresses are relative to the page's own, so a proxy's prefix is kept.

const KEY = "fastblt-key";
const base = new URL(".", document.baseURI);

export const address = (path) => new URL(path, base);

export function key() {
  try {
    return sessionStorage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}

export function setKey(value) {
  try {
    sessionStorage.setItem(KEY, value);
  } catch {
    // Without storage the key is asked for again.
  }
}

/** What the server answered instead of what was asked for. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

async function call(path, options = {}) {
  const headers = { ...(options.headers ?? {}) };
  if (key()) headers.authorization = `Bearer ${key()}`;
  let response;
  try {
    response = await fetch(address(path), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "the server cannot be reached; is it running?");
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let message = `the server answered ${response.status}`;
  try {
    message = (await response.json()).error.message ?? message;
  } catch {
    // Not the server's own answer: a proxy's, perhaps.
  }
  return new Refused(response.status, message);
}

export const json = async (path) => (await call(path)).json();
export const text = async (path) => (await call(path)).text();

/** The events of a streamed completion, parsed, as they come. Throws Refused for an error in mid-stream too. */
export async function* complete(body, signal) {
  const response = await call("v1/completions", {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(500, event.error.message);
      yield event;
    }
  }
}

/** The same request for a shell. */
export function curl(body) {
  const quoted = JSON.stringify(body, null, 1).replace(/\n\s*/g, " ").replaceAll("'", "'\\''");
  const auth = key() ? " -H \"Authorization: Bearer $KEY\"" : "";
  return `curl ${address("v1/completions")} -H 'Content-Type: application/json'${auth} -d '${quoted}'`;
}
