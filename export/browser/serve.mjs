// Serves this page, and the exported folder beside it as model/, on 127.0.0.1: node serve.mjs FOLDER [PORT]

import { createReadStream, existsSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { dirname, extname, join } from "node:path";
import { fileURLToPath } from "node:url";

const TYPES = {
  ".css": "text/css; charset=utf-8",
  ".html": "text/html; charset=utf-8",
  ".jpg": "image/jpeg",
  ".js": "text/javascript; charset=utf-8",
  ".json": "application/json",
  ".mjs": "text/javascript; charset=utf-8",
  ".onnx": "application/octet-stream",
  ".wasm": "application/wasm",
};
const SERVED = new RegExp(
  "^(index\\.html|style\\.css|(page|classifier|pictures)\\.js|demo/\\w+\\.jpg|runtime/[\\w.-]+\\.(mjs|wasm)" +
    "|model/((card|labels)\\.json|model\\.onnx))$",
);
const HEADERS = {
  // Together these two let WebAssembly use several threads.
  "Cross-Origin-Opener-Policy": "same-origin",
  "Cross-Origin-Embedder-Policy": "require-corp",
  "X-Content-Type-Options": "nosniff",
  "Cache-Control": "no-cache",
};
const KIT = dirname(fileURLToPath(import.meta.url));

function fail(message) {
  console.error(`error: ${message}`);
  process.exit(2);
}

const [folder, port = "8000"] = process.argv.slice(2);
if (!folder) fail("name the folder that sdzoo export wrote: node serve.mjs FOLDER [PORT]");
if (!existsSync(join(folder, "card.json"))) fail(`${folder} holds no card.json; name a folder that sdzoo export wrote`);
if (!existsSync(join(KIT, "runtime"))) fail("onnxruntime-web is not here yet; run: node fetch.mjs");
if (!/^\d{1,5}$/.test(port) || Number(port) > 65535) fail(`the port is ${port}; a number from 0 to 65535 is allowed`);

/** Return the file that `path` of a URL names, or nothing: only what the page asks for is served. */
function fileOf(path) {
  const name = path === "/" ? "index.html" : path.slice(1);
  const file = name.startsWith("model/") ? join(folder, name.slice("model/".length)) : join(KIT, name);
  return SERVED.test(name) && existsSync(file) && statSync(file).isFile() ? file : undefined;
}

const server = createServer((request, response) => {
  let file;
  try {
    file = fileOf(decodeURIComponent(new URL(request.url, "http://127.0.0.1").pathname));
  } catch {
    // a URL that cannot be decoded names no file
  }
  if (!["GET", "HEAD"].includes(request.method)) return response.writeHead(405, { Allow: "GET, HEAD" }).end();
  if (!file) return response.writeHead(404, HEADERS).end();
  response.writeHead(200, { ...HEADERS, "Content-Type": TYPES[extname(file)], "Content-Length": statSync(file).size });
  if (request.method === "HEAD") return response.end();
  createReadStream(file).on("error", () => response.destroy()).pipe(response);
});
server.on("error", (error) => {
  fail(error.code === "EADDRINUSE" ? `port ${port} is in use; give another: node serve.mjs ${folder} PORT` : error.message);
});
server.listen(Number(port), "127.0.0.1", () => console.log(`http://127.0.0.1:${server.address().port}/`));
