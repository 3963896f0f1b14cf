/* espalier rollouts check: is a file of rollouts what it should be, and what is in it? */
#include "cli/cli.h"

#include "models/family.h"
#include "rl/rollout_file.h"

#include <math.h>
#include <string.h>

/* What the model that the rollouts are for says of them. */
static esp_status take_limits(espi_rollout_limits *limits, const char *dir) {
    espi_config config;
    esp_tokenizer *tokenizer = NULL;
    esp_status status = espi_config_read(&config, dir);
    if (status != ESP_OK) return status;
    limits->vocab = config.vocab;
    limits->layers = config.layers;
    limits->experts = config.experts;
    limits->top_k = config.top_k;
    espi_config_free(&config);
    status = esp_tokenizer_load(&tokenizer, dir);
    if (status == ESP_OK) espi_tokenizer_hash(limits->tokenizer_hash, tokenizer);
    esp_tokenizer_destroy(tokenizer);
    return status;
}

static void print_versions(const espi_rollout_summary *s) {
    if (s->first_version < 0) return;
    printf("adapter versions    %lld", (long long)s->first_version);
    if (s->last_version != s->first_version) printf(" to %lld", (long long)s->last_version);
    printf("\n");
}

static void print_facts(const espi_rollout_facts *f) {
    if (*f->model_id) printf("model               %s\n", f->model_id);
    if (f->vocab_size >= 0) printf("vocabulary          %lld\n", (long long)f->vocab_size);
    if (*f->tokenizer_hash) printf("tokenizer hash      %s\n", f->tokenizer_hash);
    printf("sampled with       ");
    if (!isnan(f->temperature)) printf(" temperature %g", f->temperature);
    if (f->top_k >= 0) printf(" top_k %lld", (long long)f->top_k);
    if (!isnan(f->top_p)) printf(" top_p %g", f->top_p);
    if (!isnan(f->min_p)) printf(" min_p %g", f->min_p);
    if (f->seed >= 0) printf(" seed %lld", (long long)f->seed);
    printf("%s\n", isnan(f->temperature) && f->top_k < 0 && isnan(f->top_p) && isnan(f->min_p) && f->seed < 0 ? " (not said)" : "");
}

static void print_rewards(const espi_rollout_file *file, const espi_rollout_summary *s) {
    const espi_rollout_facts *f = espi_rollout_file_facts(file);
    const int64_t n = espi_rollout_file_extent(file)->rewards;
    if (!espi_rollout_file_has(file, ESPI_COLUMN_REWARDS)) {
        printf("rewards             none, advantages\n");
        return;
    }
    printf("rewards             %lld", (long long)n);
    for (int64_t i = 0; i < n && f->reward_names; i++) printf("%s%s", i ? ", " : ": ", f->reward_names[i]);
    printf("; %lld not scorable, %lld groups without spread\n", (long long)s->unscored, (long long)s->without_spread);
}

static void print_summary(const espi_rollout_file *file, const espi_rollout_summary *s) {
    const espi_rollout_extent *e = espi_rollout_file_extent(file);
    char correction[256];
    espi_rollout_correction_tell(correction, s, "tis"); /* unless training is told another */
    printf("rows                %lld in %lld groups of %lld\n", (long long)s->rows, (long long)s->groups, (long long)s->group_size);
    printf("tokens              %lld, %lld in the loss; longest row %lld, longest completion %lld; %lld rows cut\n", (long long)s->tokens,
           (long long)s->counted, (long long)s->longest, (long long)s->longest_completion, (long long)s->truncated);
    print_rewards(file, s);
    if (e->route_bytes > 0)
        printf("routed experts      %lld layers, %lld a token, %lld bits\n", (long long)e->layers, (long long)e->top_k,
               8 * (long long)e->route_bytes);
    if (espi_rollout_file_has(file, ESPI_COLUMN_KEPT_IDS)) printf("kept ids            %lld\n", (long long)e->kept);
    print_versions(s);
    print_facts(espi_rollout_file_facts(file));
    printf("correction          %s\nok\n", correction);
}

static esp_status check(const char *path, const char *model) {
    espi_rollout_limits limits = ESPI_ROLLOUT_LIMITS_NONE;
    espi_rollout_file *file = NULL;
    espi_rollout_summary summary;
    esp_status status = model ? take_limits(&limits, model) : ESP_OK;
    if (status == ESP_OK) status = espi_rollout_file_open(&file, path);
    if (status == ESP_OK) status = espi_rollout_file_check(&summary, file, &limits);
    if (status == ESP_OK) print_summary(file, &summary);
    espi_rollout_file_close(file);
    return status;
}

int espi_cli_rollouts(int argc, char **argv) {
    const char *operands[2], *model = NULL;
    const espi_option options[] = {
        {"--model", ESPI_OPTION_TEXT, &model, "DIR", "the model they are for: vocabulary, tokenizer and experts are compared"}};
    const espi_usage usage = {"rollouts",      "Checks a file of rollouts: a summary of it, or the first fault and where it is.",
                              "check FILE.h5", operands,
                              options,         1};
    int code;
    if (!espi_cli_parse(&code, &usage, argc, argv)) return code;
    if (strcmp(operands[0], "check") != 0) return espi_cli_misuse(&usage, "'%s' is nothing that it does; it knows check", operands[0]);
    const esp_status status = check(operands[1], model);
    return status == ESP_OK ? code : espi_cli_failed("rollouts", status);
}
