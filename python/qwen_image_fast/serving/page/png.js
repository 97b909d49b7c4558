// What a PNG of this package was made with: the JSON in its iTXt chunk `parameters`.

const SIGNATURE = [137, 80, 78, 71, 13, 10, 26, 10];

/** The parameters in a file, or null where it has none of ours. */
export async function parametersOf(file) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  if (!SIGNATURE.every((byte, k) => bytes[k] === byte)) return null;
  const view = new DataView(bytes.buffer);
  for (let at = 8; at + 12 <= bytes.length; ) {
    const length = view.getUint32(at);
    const type = String.fromCharCode(...bytes.subarray(at + 4, at + 8));
    const body = bytes.subarray(at + 8, at + 8 + length);
    if (type === "iTXt") {
      const found = read(body);
      if (found) return found;
    }
    if (type === "IEND") return null;
    at += 12 + length;
  }
  return null;
}

/** keyword 0, compressed?, method, language 0, translated keyword 0, text in UTF-8. */
function read(body) {
  const end = body.indexOf(0);
  if (new TextDecoder("latin1").decode(body.subarray(0, end)) !== "parameters" || body[end + 1] !== 0) return null;
  const language = body.indexOf(0, end + 3);
  const keyword = body.indexOf(0, language + 1);
  try {
    const found = JSON.parse(new TextDecoder().decode(body.subarray(keyword + 1)));
    return found.software === "qwen-image-fast" ? found : null;
  } catch {
    return null;
  }
}
