// Fetches the onnxruntime-web that package-lock.json pins, and puts the three files that the page needs into runtime/.

import { execFileSync } from "node:child_process";
import { copyFileSync, mkdirSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const KIT = dirname(fileURLToPath(import.meta.url));
const NEEDED = ["ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"];

execFileSync("npm", ["ci", "--ignore-scripts", "--no-audit", "--no-fund"], {
  cwd: KIT,
  stdio: "inherit",
  shell: process.platform === "win32", // npm is a .cmd there
});
mkdirSync(join(KIT, "runtime"), { recursive: true });
for (const name of NEEDED) {
  copyFileSync(join(KIT, "node_modules", "onnxruntime-web", "dist", name), join(KIT, "runtime", name));
  console.log(`runtime/${name}`);
}
