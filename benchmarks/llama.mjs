// llama.cpp through node-llama-cpp, as engines.py drives it: node llama.mjs FOLDER_WITH_NODE_MODULES
import path from "node:path";
import {createInterface} from "node:readline";
import {pathToFileURL} from "node:url";

const entry = path.join(process.argv[2], "node_modules", "node-llama-cpp", "dist", "index.js");
const {DraftSequenceTokenPredictor, getLlama} = await import(pathToFileURL(entry));
const CACHED = 128, REPEATS = 5; // as specdec times its passes
let model, sequence;

const now = () => performance.now() / 1000;
const answer = (value) => process.stdout.write(JSON.stringify(value) + "\n");
const numbers = (start, count) => Array.from({length: count}, (_, i) => start + i);

const commands = {
    async load({path: modelPath, threads, context, draft}) {
        const llama = await getLlama({gpu: false, build: "never", skipDownload: true, maxThreads: threads, logLevel: "error"});
        const open = async (modelPath, options) => {
            const loaded = await llama.loadModel({modelPath, gpuLayers: 0});
            const made = await loaded.createContext({contextSize: context, threads: {ideal: threads, min: threads}});
            return [loaded, made.getSequence(options)];
        };
        const predictor = draft ? new DraftSequenceTokenPredictor((await open(draft))[1]) : undefined; // its defaults
        [model, sequence] = await open(modelPath, {tokenPredictor: predictor});
        return {runtime: "node-llama-cpp"};
    },

    async generate({ids, count, stop}) {
        await sequence.clearHistory();
        const tokens = [], start = now();
        let first = start;
        for await (const token of sequence.evaluate(ids, {temperature: 0, yieldEogToken: true})) {
            if (tokens.length === 0) first = now();
            tokens.push(token);
            if (tokens.length === count || (stop && model.isEogToken(token))) break;
        }
        return {tokens, prefill: first - start, decode: now() - first};
    },

    async passes({rows}) {
        await sequence.clearHistory();
        await sequence.evaluateWithoutGeneratingNewTokens(numbers(1, CACHED));
        const best = {};
        for (let repeat = 0; repeat <= REPEATS; repeat++) {
            for (const count of rows) {
                const input = numbers(1000, count).map((token) => [token, {generateNext: {token: true, options: {temperature: 0}}}]);
                const start = now();
                await sequence.controlledEvaluate(input);
                if (repeat > 0) best[count] = Math.min(best[count] ?? Infinity, now() - start);
                await sequence.eraseContextTokenRanges([{start: CACHED, end: CACHED + count}]);
            }
        }
        return best;
    }
};

answer({});
for await (const line of createInterface({input: process.stdin})) {
    const {do: name, ...given} = JSON.parse(line);
    const start = now();
    try {
        const result = await commands[name](given);
        answer({...result, seconds: now() - start});
    } catch (error) {
        answer({error: String(error)});
    }
}
process.exit(0);
