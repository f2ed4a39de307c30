// Requests to the server: the token, errors in the API's own words. Knows HTTP; nothing of images.

const TOKEN = "minidalle-token";
export const SILENT = "the server does not answer; see whether it still runs";

/** What the server refused a request with. */
export class ApiError extends Error {
  constructor(message, status = 0, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

/** Keeps a token until the tab is closed, or the page where the browser stores nothing. */
export function setToken(given) {
  if (!/^[\x21-\x7e]*$/.test(given)) {
    throw new Error("a token has no spaces and no letters beyond ASCII; copy it again");
  }
  token = given;
  try {
    sessionStorage.setItem(TOKEN, given);
  } catch {
    // The page has it.
  }
}

function stored() {
  try {
    return sessionStorage.getItem(TOKEN);
  } catch {
    return null;
  }
}

let token = stored();

/**
 * The response to a request. An object as `json` is sent as JSON, a FormData as `form`; neither asks
 * by GET.
 */
export async function request(path, { json, form, signal } = {}) {
  const headers = {};
  if (token) headers.Authorization = `Bearer ${token}`;
  if (json) headers["Content-Type"] = "application/json";
  const method = json || form ? "POST" : "GET";
  const body = json ? JSON.stringify(json) : form;
  let response;
  try {
    response = await fetch(path, { method, headers, body, signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(SILENT);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

/** The JSON of a response. */
export async function requestJson(path, options) {
  return (await request(path, options)).json();
}

/** The error of an API's body. */
export function errorOf(body, status = 0) {
  const { message = `the server answers ${status}`, code = null } = body?.error ?? {};
  return new ApiError(message, status, code);
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  if (response.status === 401) document.dispatchEvent(new CustomEvent("token-needed"));
  return errorOf(body, response.status);
}
