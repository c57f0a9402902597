// A bare client: the official NATS client, plain JSON, and nothing of FlowMesh's.
// usage: node submit.mjs URL CREDENTIALS SUBMISSION.json OUTPUT
// Prints one JSON document: the acknowledgement, the kinds of the events, how the run ended, and the value of OUTPUT.

import { createHash } from "node:crypto";
import { readFile } from "node:fs/promises";
import { decode, encode } from "@msgpack/msgpack";
import { jetstream } from "@nats-io/jetstream";
import { connect, credsAuthenticator } from "@nats-io/transport-node";

const DEADLINE_MS = 60_000;
const [url, credentials, file, output] = process.argv.slice(2);

const timer = setTimeout(() => {
  console.error("the run did not end in time");
  process.exit(1);
}, DEADLINE_MS);

const nc = await connect({ servers: url, authenticator: credsAuthenticator(await readFile(credentials)) });
try {
  const submission = JSON.parse(await readFile(file, "utf8"));

  // Listen first, then submit: the events of a run are sent once.
  const events = nc.subscribe(`fm.runs.${submission.run}`);
  const ack = await jetstream(nc).publish("fm.submit", JSON.stringify(submission), { msgID: submission.run });

  const kinds = [];
  let end;
  for await (const message of events) {
    const event = message.json();
    kinds.push(event.kind);
    if (event.kind === "ended" || event.kind === "rejected") {
      end = event;
      break;
    }
  }

  const reply = await nc.request("fm.ask", JSON.stringify({ what: "run", args: { run: submission.run } }), { timeout: 10_000 });
  const answer = reply.json();
  const value = output && end.outputs?.[output] ? await content(nc, end.outputs[output][0].cid) : null;
  console.log(JSON.stringify({ ack: { stream: ack.stream, duplicate: ack.duplicate }, kinds, end, state: answer.body?.state, value }));
} finally {
  clearTimeout(timer);
  await nc.drain();
}

// Returns the JSON value behind a CID: one raw block, checked against the SHA-256 in its name.
async function content(nc, text) {
  const cid = base32(text.slice(1));
  const reply = await nc.request("fm.get", encode(["get/1", cid, 0]), { timeout: 10_000 });
  const [tag, blocks, codecs, cursor, error] = decode(reply.data);
  if (tag !== "blocks/1" || error || blocks.length !== 1 || codecs[0] !== 0x55 || cursor !== -1) {
    throw new Error(`unexpected answer: ${tag} ${error}`);
  }
  const digest = createHash("sha256").update(blocks[0]).digest();
  if (Buffer.compare(digest, Buffer.from(cid.slice(4))) !== 0) {
    throw new Error("the block is not what its CID names");
  }
  return JSON.parse(Buffer.from(blocks[0]).toString("utf8"));
}

// Decodes base32 without padding (RFC 4648, lower case), as CIDs are written.
function base32(text) {
  const alphabet = "abcdefghijklmnopqrstuvwxyz234567";
  const bytes = [];
  let bits = 0;
  let held = 0;
  for (const letter of text) {
    held = (held << 5) | alphabet.indexOf(letter);
    bits += 5;
    if (bits >= 8) {
      bits -= 8;
      bytes.push((held >> bits) & 0xff);
      held &= (1 << bits) - 1;
    }
  }
  return Uint8Array.from(bytes);
}
