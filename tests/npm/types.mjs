// Prints TypeScript types of the bus, made from schemas/*.json. Argument: the folder of the schemas.

import { createHash } from "node:crypto";
import { readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import process from "node:process";
import { isDeepStrictEqual } from "node:util";

import { compile } from "json-schema-to-typescript";

const folder = process.argv[2];
const hash = createHash("sha256");
const definitions = {};

/** One definition may come with several messages; it must be the same in each. */
function define(name, schema) {
  if (name in definitions && !isDeepStrictEqual(definitions[name], schema)) {
    throw new Error(`${name} is defined twice, differently`);
  }
  definitions[name] = schema;
}

for (const file of (await readdir(folder)).sort()) {
  if (!file.endsWith(".json") || file === "asyncapi.json") {
    continue;
  }
  const text = await readFile(join(folder, file), "utf8");
  hash.update(file).update("\0").update(text).update("\0");
  const { $schema, $id, $defs, ...root } = JSON.parse(text);
  for (const [name, schema] of Object.entries($defs ?? {})) {
    define(name, schema);
  }
  define(root.title, root);
}

/** What stands beside a reference makes a type of its own, and unlisted fields would hide a typing error. */
function plain(node) {
  if (Array.isArray(node)) {
    return node.map(plain);
  }
  if (node === null || typeof node !== "object") {
    return node;
  }
  if ("$ref" in node) {
    return { $ref: node.$ref };
  }
  const made = Object.fromEntries(Object.entries(node).map(([key, value]) => [key, plain(value)]));
  return node.type === "object" ? { additionalProperties: false, ...made } : made;
}

const types = await compile(plain({ title: "Unused", type: "object", $defs: definitions }), "Unused", {
  bannerComment: "",
  ignoreMinAndMaxItems: true, // else a list of at most 20 is a union of 20 tuples
  unreachableDefinitions: true,
});
const own = types
  .replace(/^export interface Unused \{\}\n/, "")
  .replace(/( \*\n)? \* This interface was referenced by `Unused`'s JSON-Schema\n \* via the `definition` "\w+"\.\n/g, "")
  .replace(/^\/\*\*\n \*\/\n/gm, "");
process.stdout.write(`/* Messages of the bus, generated from the JSON Schemas here by \`make generate\`; do not edit.
   Of: ${hash.digest("hex")} */

${own}`);
