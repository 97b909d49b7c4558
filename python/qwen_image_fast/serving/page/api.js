// The server's HTTP API: jobs in the background, whose events are read as they come, so that a reload loses nothing.

let key = localStorage.getItem("key") ?? "";

export function setKey(value) {
  key = value;
  localStorage.setItem("key", value);
}

export class ApiError extends Error {
  constructor(status, error) {
    super(error?.message ?? `the server answered ${status}`);
    this.status = status;
    this.code = error?.code ?? null;
    this.param = error?.param ?? null;
  }
}

async function ask(path, options = {}) {
  const headers = { ...(key ? { authorization: `Bearer ${key}` } : {}), ...options.headers };
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch {
    throw new ApiError(0, { message: "the server cannot be reached" });
  }
  if (!answer.ok) throw new ApiError(answer.status, (await answer.json().catch(() => ({}))).error);
  return answer;
}

export const models = async () => (await ask("/v1/models")).json();
export const isReady = async () => (await ask("/readyz")).json();
export const cancel = async (id) => (await ask(`/v1/jobs/${id}`, { method: "DELETE" })).json();

/** Submit; `pictures` and `mask` are blobs. Returns the job. */
export async function submit(endpoint, values, pictures, mask) {
  const headers = { prefer: "respond-async" };
  let body;
  if (endpoint === "generations") {
    headers["content-type"] = "application/json";
    body = JSON.stringify(values);
  } else {
    body = new FormData();
    for (const [name, value] of Object.entries(values)) {
      body.append(name, typeof value === "object" ? JSON.stringify(value) : String(value));
    }
    for (const picture of pictures) body.append(pictures.length > 1 ? "image[]" : "image", picture, "picture");
    if (mask) body.append("mask", mask, "mask.png");
  }
  return (await ask(`/v1/images/${endpoint}`, { method: "POST", headers, body })).json();
}

/** Calls onprogress for each event; returns the result, or throws what became of it. */
export async function watch(id, onprogress) {
  const answer = await ask(`/v1/jobs/${id}/events`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError(0, { message: "the connection to the server was lost" });
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const line = part.split("\n").find((text) => text.startsWith("data: "));
      if (!line) continue;
      const data = JSON.parse(line.slice(6));
      if (data.error) throw new ApiError(500, data.error);
      if (data.type === "job.completed") {
        reader.cancel();
        return data.result;
      }
      onprogress(data);
    }
  }
}
