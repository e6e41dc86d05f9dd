// Runs the model for index.html, in a thread of its own: while a token is worked out, a thread answers to nothing.

const modules = new URL("./node_modules", import.meta.url).href;
const tell = (what, beside) => postMessage({ what, ...beside });
const since = (started) => (performance.now() - started) / 1000;

let tokenizer, model, streamed, stopping;

const asked = {
  async load({ folder, device }) {
    const started = performance.now();
    const { AutoModelForCausalLM, AutoTokenizer, InterruptableStoppingCriteria, TextStreamer, env } = await import(
      `${modules}/@huggingface/transformers/dist/transformers.min.js`
    ).catch(() => {
      throw new Error("Beside this page is no transformers.js: npm install --ignore-scripts @huggingface/transformers@4");
    });
    env.allowRemoteModels = false;
    env.allowLocalModels = true;
    env.localModelPath = "./";
    env.useBrowserCache = false; // it goes by the name alone, and another model may come to have that
    const runtime = `${modules}/onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify`;
    env.backends.onnx.wasm.wasmPaths = { mjs: `${runtime}.mjs`, wasm: `${runtime}.wasm` };

    const config = await fetch(`${folder}/config.json`);
    if (!config.ok || !(await config.json())["transformers.js_config"]) {
      throw new Error(`Beside this page is no model “${folder}”: rrtc export … -o ${folder} --format onnx makes one.`);
    }
    const files = new Map();
    const sum = (key) => [...files.values()].reduce((bytes, file) => bytes + file[key], 0);
    const progress_callback = (event) => {
      if (event.status !== "progress") return;
      files.set(event.file, event);
      tell("fetched", { loaded: sum("loaded"), total: sum("total") });
    };
    tokenizer = await AutoTokenizer.from_pretrained(folder);
    model = await AutoModelForCausalLM.from_pretrained(folder, { device, progress_callback });
    // The wish to stop is heard between two tokens, if the thread rests there.
    const forward = model.forward.bind(model);
    model.forward = async (inputs) => {
      await new Promise((rested) => setTimeout(rested));
      return forward(inputs);
    };
    const callback_function = (piece) => tell("piece", { piece });
    streamed = () => new TextStreamer(tokenizer, { skip_prompt: true, skip_special_tokens: true, callback_function });
    stopping = new InterruptableStoppingCriteria();
    tell("loaded", { total: sum("total"), seconds: since(started) });
  },

  async write({ prompt, most }) {
    stopping.reset();
    const inputs = tokenizer(prompt);
    const started = performance.now();
    const options = { max_new_tokens: most, do_sample: false, streamer: streamed(), stopping_criteria: stopping };
    const output = await model.generate({ ...inputs, ...options });
    const tokens = output.tolist()[0].map(Number).slice(inputs.input_ids.dims[1]);
    tell("done", { tokens, seconds: since(started) });
  },

  async stop() {
    stopping.interrupt();
  },
};

const failed = (error) => tell("failed", { words: String(error.message ?? error) });
onmessage = ({ data }) => asked[data.what](data).catch(failed);
