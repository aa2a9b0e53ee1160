// Reads a JSON list of LogQL queries, writes a JSON list of their syntax trees by Loki's official grammar. A node is
// {name, text, error, children}; a query that is none has a node with error = true. tests/loki.py does the rest.
import { readFileSync } from "node:fs";
import { parser } from "@grafana/lezer-logql";

function tree(query, node) {
  const children = [];
  for (let child = node.firstChild; child; child = child.nextSibling) children.push(tree(query, child));
  return { name: node.name, text: query.slice(node.from, node.to), error: node.type.isError, children };
}

const queries = JSON.parse(readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(queries.map((query) => tree(query, parser.parse(query).topNode))));
