// The student's two towers, run by onnxruntime-web on this machine.

import { pixelValues } from "./pictures.js";
import { makeTokenizer } from "./tokenizer.js";

const LONGEST_TEXT = 8192; // characters; the student reads far fewer tokens

let runtime = null;

async function loadRuntime() {
  if (!runtime) {
    try {
      runtime = await import("./runtime/ort.wasm.bundle.min.mjs");
    } catch {
      throw new Error("The folder runtime is missing: open this site with python -m inference.web_open");
    }
    runtime.env.wasm.wasmPaths = { wasm: new URL("./runtime/ort-wasm-simd-threaded.wasm", import.meta.url).href };
    runtime.env.wasm.numThreads = 1; // several need headers that few hosts of static sites send
    runtime.env.logLevel = "error";
  }
  return runtime;
}

async function loadSession(model) {
  const ort = await loadRuntime();
  try {
    return await ort.InferenceSession.create(model, { executionProviders: ["wasm"] });
  } catch (error) {
    throw new Error(`The runtime cannot run this student: ${error.message ?? error}`);
  }
}

async function embed(session, feeds) {
  const outputs = await session.run(feeds);
  return outputs[session.outputNames[0]].data;
}

// A function text -> {embedding [D], cut}. `model` is the file's bytes, `tokenizer` a parsed tokenizer.json.
export async function loadTextTower(model, tokenizer) {
  const tokenize = makeTokenizer(tokenizer);
  const session = await loadSession(model);
  const { Tensor } = await loadRuntime();
  const read = async (text) => {
    const { ids, cut } = tokenize(text.slice(0, LONGEST_TEXT));
    const shape = [1, ids.length];
    const embedding = await embed(session, {
      input_ids: new Tensor("int64", BigInt64Array.from(ids, BigInt), shape),
      attention_mask: new Tensor("int64", new BigInt64Array(ids.length).fill(1n), shape),
    });
    return { embedding, cut: cut ? ids.length : 0 };
  };
  await read("warm up"); // or the first search would be slower than all others
  return read;
}

// A function picture (see pictures.js) -> {embedding [D]}. `settings` are those of preprocessor_config.json.
export async function loadVisionTower(model, settings) {
  const session = await loadSession(model);
  const { Tensor } = await loadRuntime();
  const { width, height } = settings.size;
  const encode = (pixels) => embed(session, { pixel_values: new Tensor("float32", pixels, [1, 3, height, width]) });
  await encode(new Float32Array(3 * height * width)); // or the first search would be slower than all others
  return async (picture) => ({ embedding: await encode(pixelValues(picture, settings)) });
}
