// Server-sent events of a response to a POST, which EventSource cannot ask for. Knows the format
// alone: https://html.spec.whatwg.org/multipage/server-sent-events.html

import { ApiError, SILENT } from "/page/api.js";

/** Yields the JSON of each event's data. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { value, done } = await reader.read().catch(asError);
      if (done) break;
      text += value.replaceAll("\r", "");
      const blocks = text.split("\n\n");
      text = blocks.pop();
      for (const block of blocks) {
        const data = dataOf(block);
        if (data) yield JSON.parse(data);
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}

/** What reading failed with: the user's own end of it, or the server's silence. */
function asError(error) {
  throw error.name === "AbortError" ? error : new ApiError(SILENT);
}

function dataOf(block) {
  const lines = block.split("\n").filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
}
