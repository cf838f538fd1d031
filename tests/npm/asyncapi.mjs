// Reads AsyncAPI documents with the parser of the AsyncAPI project. Arguments: files.
// A line per finding, and exit code 1, where one is no valid document.

import { readFile } from "node:fs/promises";
import process from "node:process";

import { DiagnosticSeverity, Parser } from "@asyncapi/parser";

const parser = new Parser();
let broken = false;
for (const path of process.argv.slice(2)) {
  const { document, diagnostics } = await parser.parse(await readFile(path, "utf8"), { source: path });
  const errors = diagnostics.filter((found) => found.severity === DiagnosticSeverity.Error);
  for (const { code, path: where, message } of errors) {
    console.log(`${path}: ${where.join(".")}: ${message} (${code})`);
  }
  if (document === undefined || errors.length > 0) {
    broken = true;
  } else {
    console.log(`${path}: ${document.allChannels().all().length} channels, ${document.allMessages().all().length} messages`);
  }
}
process.exitCode = broken ? 1 : 0;
