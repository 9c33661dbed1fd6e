// llama.cpp's own RPC backend, as a yardstick for `make bench-split`: no part of satgrid uses it, and by its own README it
// must never face an open network. Built by tests/scripts/bench-split.py from the vendored sources beside the libraries that
// cargo has built already.
//
//   rpc_bench serve HOST:PORT THREADS                          a server with this machine's processor, until it is killed
//   rpc_bench run MODEL THREADS REMOTE_LAYERS TOKENS [HOST:PORT ...]   loads, then for each line that it reads decodes, and prints milliseconds a token
//
// Without servers `run` is llama.cpp alone.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "ggml-backend.h"
#include "ggml-rpc.h"
#include "llama.h"

static int fail(const char * what) {
    fprintf(stderr, "rpc_bench: %s\n", what);
    return 1;
}

static int serve(const char * endpoint, int threads) {
    ggml_backend_dev_t cpu = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
    if (cpu == nullptr) return fail("no processor device");
    ggml_backend_rpc_start_server(endpoint, nullptr, threads, 1, &cpu);
    return fail("the server ended");
}

/// Decodes token after token, each drawn from the one before; prints a line of JSON.
static void measure(llama_context * context, int vocab, int tokens) {
    std::vector<double> times;
    for (int n = 0; n < tokens; n++) {
        const float * logits = llama_get_logits_ith(context, -1);
        llama_token token = (llama_token) (std::max_element(logits, logits + vocab) - logits);
        auto began = std::chrono::steady_clock::now();
        if (llama_decode(context, llama_batch_get_one(&token, 1)) != 0) exit(fail("no decode"));
        llama_synchronize(context);
        times.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - began).count());
    }
    std::sort(times.begin(), times.end());
    double sum = 0;
    for (double one : times) sum += one;
    printf("{\"mean_ms\": %.3f, \"median_ms\": %.3f}\n", sum / times.size(), times[times.size() / 2]);
    fflush(stdout);
}

static int run(int argc, char ** argv) {
    const char * path = argv[2];
    int threads = atoi(argv[3]), remote = atoi(argv[4]), tokens = atoi(argv[5]);
    std::vector<ggml_backend_dev_t> devices;
    for (int at = 6; at < argc; at++) {
        ggml_backend_reg_t reg = ggml_backend_rpc_add_server(argv[at]);
        if (reg == nullptr) return fail("a server does not answer");
        devices.push_back(ggml_backend_reg_dev_get(reg, 0));
    }
    bool split = !devices.empty();
    devices.push_back(nullptr);
    llama_model_params model_params = llama_model_default_params();
    model_params.devices = devices.data();
    model_params.n_gpu_layers = 0;
    std::vector<float> shares(llama_max_devices(), 0.0f);
    if (split) {
        // The last layers and the head over the servers in equal shares, the layers before them here.
        model_params.n_gpu_layers = remote + 1;
        std::fill(shares.begin(), shares.begin() + (argc - 6), 1.0f);
        model_params.tensor_split = shares.data();
    }
    llama_model * model = llama_model_load_from_file(path, model_params);
    if (model == nullptr) return fail("the model does not load");
    llama_context_params params = llama_context_default_params();
    params.n_ctx = 1024;
    params.n_batch = 512;
    params.n_threads = threads;
    params.n_threads_batch = threads;
    params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context * context = llama_init_from_model(model, params);
    if (context == nullptr) return fail("no context");
    int vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
    std::vector<llama_token> prompt;
    for (int n = 0; n < 16; n++) prompt.push_back(10 + n);
    printf("ready\n");
    fflush(stdout);
    char line[16];
    while (fgets(line, sizeof line, stdin) != nullptr) {
        llama_memory_clear(llama_get_memory(context), true);
        if (llama_decode(context, llama_batch_get_one(prompt.data(), (int) prompt.size())) != 0) return fail("no prefill");
        measure(context, vocab, tokens);
    }
    return 0;
}

static void quiet(ggml_log_level level, const char * text, void *) {
    if (level == GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
}

int main(int argc, char ** argv) {
    llama_log_set(quiet, nullptr);
    llama_backend_init();
    if (argc == 4 && strcmp(argv[1], "serve") == 0) return serve(argv[2], atoi(argv[3]));
    if (argc >= 6 && strcmp(argv[1], "run") == 0) return run(argc, argv);
    return fail("rpc_bench serve HOST:PORT THREADS | rpc_bench run MODEL THREADS REMOTE_LAYERS TOKENS [HOST:PORT ...]");
}
