/* Reads options and config files by one table. */
#include "options.h"

#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef enum type { TEXT, I32, I64, U64, BYTES, REAL, FLAG, CHOICE, TARGETS, REWARD, COMMAND } type;
/* Which numbers are taken.  0 stands for the default inside the structs, so a 0 that was written must mean 0 or be refused. */
typedef enum range { ANY, POSITIVE, NOT_NEGATIVE, NOT_ZERO } range;
enum { SFT = 1, GRPO = 2, BOTH = 3 };

typedef struct choice {
    const char *word;
    int value;
} choice;

typedef struct option {
    const char *name; /* the key of a config file; on the command line with -- in front and - or _ inside */
    type type;
    range range;
    size_t offset;
    int programs;
    const choice *choices;
    const char *help;
} option;

static const choice formats[] = {{"nf4", ESP_NF4}, {"fp4", ESP_FP4}, {"mxfp4", ESP_MXFP4}, {"none", ESP_Q_NONE}, {NULL, 0}};
static const choice losses[] = {{"grpo", ESP_LOSS_GRPO},   {"bnpo", ESP_LOSS_BNPO},   {"dr_grpo", ESP_LOSS_DR_GRPO},
                                {"dapo", ESP_LOSS_DAPO},   {"cispo", ESP_LOSS_CISPO}, {"sapo", ESP_LOSS_SAPO},
                                {"luspo", ESP_LOSS_LUSPO}, {"vespo", ESP_LOSS_VESPO}, {NULL, 0}};
static const choice levels[] = {{"token", ESP_IS_TOKEN}, {"sequence", ESP_IS_SEQUENCE}, {NULL, 0}};
static const choice kl_grads[] = {{"k2", ESP_KL_GRAD_K2}, {"k3", ESP_KL_GRAD_K3}, {NULL, 0}};
static const choice scales[] = {{"none", ESP_SCALE_NONE}, {"group", ESP_SCALE_GROUP}, {"batch", ESP_SCALE_BATCH}, {NULL, 0}};
static const choice references[] = {{"base", ESP_REFERENCE_BASE}, {"snapshot", ESP_REFERENCE_SNAPSHOT}, {NULL, 0}};
static const choice corrections[] = {
    {"none", ESP_CORRECTION_NONE}, {"tis", ESP_CORRECTION_TIS}, {"mis", ESP_CORRECTION_MIS}, {"icepop", ESP_CORRECTION_ICEPOP}, {NULL, 0}};
static const choice orders[] = {{"sum_then_normalize", ESP_SUM_THEN_NORMALIZE}, {"normalize_then_sum", ESP_NORMALIZE_THEN_SUM}, {NULL, 0}};
static const choice replays[] = {
    {"default", ESP_REPLAY_DEFAULT}, {"none", ESP_REPLAY_NONE}, {"r2", ESP_REPLAY_R2}, {"r3", ESP_REPLAY_R3}, {NULL, 0}};
static const choice mxfp4_rules[] = {{"ocp", ESP_MXFP4_OCP}, {"round_up", ESP_MXFP4_ROUND_UP}, {NULL, 0}};
static const choice schedules[] = {{"constant", ESP_SCHEDULE_CONSTANT},
                                   {"linear", ESP_SCHEDULE_LINEAR},
                                   {"cosine", ESP_SCHEDULE_COSINE},
                                   {"cosine_with_restarts", ESP_SCHEDULE_COSINE_WITH_RESTARTS},
                                   {NULL, 0}};
static const choice targets[] = {{"q", ESP_LORA_Q},
                                 {"k", ESP_LORA_K},
                                 {"v", ESP_LORA_V},
                                 {"o", ESP_LORA_O},
                                 {"gate_up", ESP_LORA_GATE_UP},
                                 {"down", ESP_LORA_DOWN},
                                 {"attention", ESP_LORA_ATTENTION},
                                 {"experts", ESP_LORA_EXPERTS},
                                 {"all", ESP_LORA_ALL},
                                 {NULL, 0}};

#define S(field) offsetof(settings, field)
#define T(field) offsetof(settings, trainer.field)
#define O(field) offsetof(settings, trainer.objective.field)
#define A(field) offsetof(settings, trainer.adamw.field)
#define M(field) offsetof(settings, model.field)
#define C(field) offsetof(settings, ctx.field)
static const option options[] = {
    {"model", TEXT, ANY, S(model_dir), BOTH, NULL, "Hugging Face folder of the model; required"},
    {"train", TEXT, ANY, T(train_file), BOTH, NULL, "JSONL with \"prompt\" and \"answer\"; required"},
    {"rollouts", TEXT, ANY, T(rollouts), GRPO, NULL, "HDF5 file of rollouts, or a folder of them, to train on instead of --train"},
    {"save_rollouts", TEXT, ANY, T(save_rollouts), GRPO, NULL, "folder that gets each generation as a file, as --rollouts reads it"},
    {"eval", TEXT, ANY, T(eval_file), BOTH, NULL, "JSONL of the same form to measure exact answers on"},
    {"out", TEXT, ANY, T(out_dir), BOTH, NULL, "folder for metrics, completions, plot, checkpoint and adapter"},
    {"resume", TEXT, ANY, T(resume_dir), BOTH, NULL, "folder of an earlier run to go on from, or a checkpoint file in one"},
    {"preset", TEXT, ANY, S(preset), GRPO, NULL,
     "trl-default|dapo|dr-grpo|gspo-moe|cispo: a known recipe; options that are set as well win over it"},
    {"dry_run", FLAG, ANY, S(dry_run), BOTH, NULL, "tell every setting, the plan and its memory; train nothing, write nothing"},
    {"plot", TEXT, ANY, S(plot_file), BOTH, NULL, "SVG of all curves, drawn anew while the run goes on"},
    {"steps", I64, POSITIVE, T(steps), BOTH, NULL, "optimiser steps in all (60)"},
    {"seed", U64, ANY, T(seed), BOTH, NULL, "of sampling, order of the lines, and LoRA init (0)"},
    {"prompts_per_step", I32, POSITIVE, T(prompts_per_step), BOTH, NULL, "prompts of a GRPO step (16), lines of an SFT step (32)"},
    {"group_size", I32, POSITIVE, T(group_size), GRPO, NULL, "completions of a prompt (8)"},
    {"max_new_tokens", I32, POSITIVE, T(max_new_tokens), BOTH, NULL, "of a completion, end token included (10)"},
    {"temperature", REAL, POSITIVE, T(temperature), GRPO, NULL, "of training samples (1); greedy answers are measured by --eval"},
    {"micro_batch_tokens", I32, NOT_NEGATIVE, T(micro_batch_tokens), BOTH, NULL, "tokens of one forward and backward; 0 = all at once (0)"},
    {"updates_per_batch", I32, POSITIVE, T(updates_per_batch), GRPO, NULL, "how often each generation is trained on (1)"},
    {"steps_per_generation", I32, POSITIVE, T(steps_per_generation), GRPO, NULL,
     "steps that share one generation, its groups shuffled among them (1)"},
    {"resample_tries", I32, NOT_NEGATIVE, T(resample_tries), GRPO, NULL,
     "so often, groups whose rewards are all equal give way to new prompts (0)"},
    {"reward", REWARD, ANY, 0, GRPO, NULL,
     "[WEIGHT*]exact|match|regex:P|number|json:J|length(target=N)|repetition|cmd:C|so:F; may be given again (exact, 0.2*match)"},
    {"reward_cmd", COMMAND, ANY, 0, GRPO, NULL, "a program that scores: JSON lines in, JSON lines out; the same as --reward cmd:C"},
    {"reward_timeout", REAL, NOT_NEGATIVE, T(reward_timeout), GRPO, NULL, "seconds for all rewards of a batch; 0 = none (0)"},
    {"order", CHOICE, ANY, T(order), GRPO, orders, "of several rewards: sum_then_normalize|normalize_then_sum (sum_then_normalize)"},
    {"overlong_share", REAL, NOT_NEGATIVE, T(overlong_share), GRPO, NULL,
     "last share of max_new_tokens over which a penalty rises; 0 = none (0)"},
    {"overlong_penalty", REAL, POSITIVE, T(overlong_penalty), GRPO, NULL, "its weight (1)"},
    {"mask_truncated", FLAG, ANY, T(mask_truncated), GRPO, NULL, "completions that were cut have no loss; their reward still counts"},
    {"reference", CHOICE, ANY, T(reference), GRPO, references, "of the KL term: base (adapter off)|snapshot (adapter at the start) (base)"},
    {"ref_sync_every", I64, NOT_NEGATIVE, T(ref_sync_every), GRPO, NULL, "steps after which the snapshot is taken anew; 0 = never (0)"},
    {"correction", CHOICE, ANY, T(correction), GRPO, corrections,
     "weight of a token by its distance from the sampler: none|tis|mis|icepop (tis with --server or --rollouts, else none)"},
    {"correction_level", CHOICE, ANY, T(correction_level), GRPO, levels, "its ratio is of a token or a sequence: token|sequence (token)"},
    {"correction_low", REAL, POSITIVE, T(correction_low), GRPO, NULL, "icepop's lower bound (0.5)"},
    {"correction_high", REAL, POSITIVE, T(correction_high), GRPO, NULL, "upper bound (tis 2, mis 3, icepop 5)"},
    {"reject_low", REAL, NOT_NEGATIVE, T(reject_low), GRPO, NULL, "sequences whose geometric mean ratio is below have no loss (0)"},
    {"reject_high", REAL, NOT_NEGATIVE, T(reject_high), GRPO, NULL, "the same above; 0 = no rejection (0)"},
    {"entropy_target", REAL, NOT_NEGATIVE, T(entropy_target), GRPO, NULL,
     "entropy below which a bonus acts, whose coefficient moves; 0 = no controller (0)"},
    {"entropy_step", REAL, POSITIVE, T(entropy_step), GRPO, NULL, "by which it moves (0.005)"},
    {"entropy_max", REAL, POSITIVE, T(entropy_max), GRPO, NULL, "its largest value (0.1)"},
    {"replay", CHOICE, ANY, T(replay), GRPO, replays,
     "experts that training takes: none (its own)|r2 (of the old policy's pass)|r3 (the sampler's)|default (r3 where there are any, else "
     "none)"},
    {"no_shared_prompts", FLAG, ANY, T(no_shared_prompts), GRPO, NULL, "every completion runs its prompt itself"},
    {"no_kl_on_zero_adv", FLAG, ANY, T(no_kl_on_zero_adv), GRPO, NULL, "groups without an advantage have no KL term either"},
    {"top_k", I32, NOT_NEGATIVE, T(top_k), GRPO, NULL, "training samples among the k likeliest tokens; 0 = all (0)"},
    {"top_p", REAL, POSITIVE, T(top_p), GRPO, NULL, "among the likeliest that add up to p (1)"},
    {"min_p", REAL, NOT_NEGATIVE, T(min_p), GRPO, NULL, "among those at least so likely as this share of the likeliest (0)"},
    {"decode_rows", I32, POSITIVE, T(decode_rows), BOTH, NULL, "completions sampled together, for a smaller KV cache (all of a step)"},
    {"rollout_timeout", REAL, NOT_NEGATIVE, T(rollout_timeout), GRPO, NULL, "seconds for one generation call; 0 = none (0)"},
    {"shuffle_rewards", FLAG, ANY, T(shuffle_rewards), GRPO, NULL, "control run: rewards change owners within a step; must not learn"},
    {"no_thinking", FLAG, ANY, T(no_thinking), BOTH, NULL, "chat messages: answers begin with an empty thinking block"},
    {"no_skip", FLAG, ANY, T(no_skip), GRPO, NULL, "also run groups whose advantages are all zero"},
    {"eval_every", I64, POSITIVE, T(eval_every), BOTH, NULL, "steps between evaluations (10)"},
    {"eval_samples", I32, POSITIVE, T(eval_samples), BOTH, NULL, "sampled completions of an evaluation line (4)"},
    {"checkpoint_every", I64, POSITIVE, T(checkpoint_every), BOTH, NULL, "steps between checkpoints (20)"},
    {"early_stop", I32, NOT_NEGATIVE, T(early_stop), BOTH, NULL, "evaluations without a better one that end the run; 0 = never (0)"},
    {"keep_best", FLAG, ANY, T(keep_best), BOTH, NULL, "keep the adapter of the best evaluation in adapter-best"},
    {"keep_checkpoints", I32, NOT_NEGATIVE, T(keep_checkpoints), BOTH, NULL,
     "keep the last so many as checkpoint-STEP.h5; 0 = only the last (0)"},
    {"server", TEXT, ANY, T(server), GRPO, NULL, "address of an OpenAI-compatible server (vLLM) that writes the completions"},
    {"server_model", TEXT, ANY, T(server_model), GRPO, NULL, "the base model's id there (the only one it lists)"},
    {"server_adapter_dir", TEXT, ANY, T(server_adapter_dir), GRPO, NULL, "folder where versions of the adapter are written for it"},
    {"server_adapter_path", TEXT, ANY, T(server_adapter_path), GRPO, NULL, "the same folder as the server sees it (the same)"},
    {"server_retries", I32, POSITIVE, T(server_retries), GRPO, NULL, "tries of a request beyond the first (4)"},
    {"server_concurrency", I32, POSITIVE, T(server_concurrency), GRPO, NULL, "requests in flight (32)"},
    {"server_timeout", REAL, POSITIVE, T(server_timeout), GRPO, NULL, "seconds of one try (120)"},
    {"server_drop_lost", FLAG, ANY, T(server_drop_lost), GRPO, NULL, "groups that no try brought are left out, not an error"},
    {"max_staleness", I32, NOT_NEGATIVE, T(max_staleness), GRPO, NULL, "versions that a completion may be behind (0)"},
    {"scale", CHOICE, ANY, T(scale), GRPO, scales, "divisor of the advantages: none|group|batch (none)"},
    {"loss", CHOICE, ANY, O(loss), GRPO, losses, "grpo|bnpo|dr_grpo|dapo|cispo|sapo|luspo|vespo (dapo)"},
    {"level", CHOICE, ANY, O(level), GRPO, levels, "importance ratio of a token or a sequence: token|sequence (token)"},
    {"epsilon_low", REAL, POSITIVE, O(epsilon_low), GRPO, NULL, "lower clip (0.2)"},
    {"epsilon_high", REAL, POSITIVE, O(epsilon_high), GRPO, NULL, "upper clip (0.2; cispo: the cap, 5)"},
    {"delta", REAL, NOT_NEGATIVE, O(delta), GRPO, NULL, "upper bound of the ratio; 0 = none (0)"},
    {"beta", REAL, NOT_NEGATIVE, O(beta), GRPO, NULL, "KL coefficient (0)"},
    {"kl_grad", CHOICE, ANY, O(kl_grad), GRPO, kl_grads, "gradient of the KL term: k2|k3 (k2)"},
    {"kl_bias_correction", FLAG, ANY, O(kl_bias_correction), GRPO, NULL, "multiply the KL term by the ratio"},
    {"sapo_temperature_pos", REAL, POSITIVE, O(sapo_temperature_pos), GRPO, NULL, "(1)"},
    {"sapo_temperature_neg", REAL, POSITIVE, O(sapo_temperature_neg), GRPO, NULL, "(1.05)"},
    {"vespo_k_pos", REAL, POSITIVE, O(vespo_k_pos), GRPO, NULL, "(2)"},
    {"vespo_lambda_pos", REAL, POSITIVE, O(vespo_lambda_pos), GRPO, NULL, "(3)"},
    {"vespo_k_neg", REAL, POSITIVE, O(vespo_k_neg), GRPO, NULL, "(3)"},
    {"vespo_lambda_neg", REAL, POSITIVE, O(vespo_lambda_neg), GRPO, NULL, "(2)"},
    {"off_policy_mask_threshold", REAL, NOT_NEGATIVE, O(off_policy_mask_threshold), GRPO, NULL, "0 = off (0)"},
    {"top_entropy_quantile", REAL, NOT_NEGATIVE, O(top_entropy_quantile), GRPO, NULL,
     "share of tokens kept, by entropy; 0 = all; not with micro-batches (0)"},
    {"entropy_coef", REAL, ANY, O(entropy_coef), GRPO, NULL, "entropy bonus (0)"},
    {"max_completion_length", I32, NOT_NEGATIVE, O(max_completion_length), GRPO, NULL, "dr_grpo's constant; 0 = max_new_tokens (0)"},
    {"lr", REAL, POSITIVE, A(lr), BOTH, NULL, "learning rate (1e-3)"},
    {"beta1", REAL, POSITIVE, A(beta1), BOTH, NULL, "(0.9)"},
    {"beta2", REAL, POSITIVE, A(beta2), BOTH, NULL, "(0.999)"},
    {"eps", REAL, POSITIVE, A(eps), BOTH, NULL, "(1e-8)"},
    {"weight_decay", REAL, NOT_NEGATIVE, A(weight_decay), BOTH, NULL, "(0)"},
    {"max_grad_norm", REAL, NOT_ZERO, A(max_grad_norm), BOTH, NULL, "clip; negative = none (1)"},
    {"schedule", CHOICE, ANY, A(schedule), BOTH, schedules, "constant|linear|cosine|cosine_with_restarts (constant)"},
    {"num_cycles", REAL, POSITIVE, A(num_cycles), BOTH, NULL, "of the cosine schedules (cosine: 0.5, with restarts: 1)"},
    {"warmup_steps", I64, NOT_NEGATIVE, A(warmup_steps), BOTH, NULL, "(0)"},
    {"total_steps", I64, NOT_NEGATIVE, A(total_steps), BOTH, NULL, "length of the schedule; needed unless it is constant"},
    {"eight_bit", FLAG, ANY, A(eight_bit), BOTH, NULL, "moments in 8 bits"},
    {"host_moments", FLAG, ANY, A(host_moments), BOTH, NULL, "of a GPU: moments in the host's memory, the same bits"},
    {"experts", CHOICE, ANY, M(experts), BOTH, formats,
     "how experts are held: nf4|fp4|mxfp4|none (as the checkpoint has them in 4 bits, else nf4)"},
    {"mxfp4_rule", CHOICE, ANY, M(mxfp4_rule), BOTH, mxfp4_rules, "how plain experts become mxfp4: ocp|round_up (ocp)"},
    {"double_quant", FLAG, ANY, M(double_quant), BOTH, NULL, "quantise the block scales too"},
    {"lora_rank", I32, POSITIVE, M(lora_rank), BOTH, NULL, "(8)"},
    {"lora_alpha", REAL, POSITIVE, M(lora_alpha), BOTH, NULL, "(2 * lora_rank)"},
    {"rslora", FLAG, ANY, M(rslora), BOTH, NULL, "scale by alpha / sqrt(rank)"},
    {"lora_targets", TARGETS, ANY, M(lora_targets), BOTH, targets, "comma list of q,k,v,o,gate_up,down,attention,experts,all (all)"},
    {"adapter", TEXT, ANY, M(adapter_dir), BOTH, NULL, "PEFT folder to start from; states rank, alpha and targets"},
    {"activation_budget", BYTES, NOT_NEGATIVE, M(activation_budget), BOTH, NULL, "bytes of saved activations; 0 = no bound (0)"},
    {"host_layers", I32, NOT_NEGATIVE, M(host_layers), BOTH, NULL, "of a GPU: layers whose weights stay in the host's memory (0)"},
    {"expert_ranks", I32, NOT_NEGATIVE, M(expert_ranks), BOTH, NULL,
     "ranks that share the experts of one model; 1: each holds all; 0 = all of the job (0)"},
    {"expert_rows", I64, NOT_NEGATIVE, M(expert_rows), BOTH, NULL, "routed rows that a rank takes at once; 0 = 1.5 of an even share (0)"},
    {"router_aux_coef", REAL, ANY, M(router_aux_coef), BOTH, NULL, "load-balancing loss (0)"},
    {"router_z_coef", REAL, ANY, M(router_z_coef), BOTH, NULL, "router z-loss (0)"},
    {"device", TEXT, ANY, S(device), BOTH, NULL, "cuda|cpu|auto: a GPU where one is usable (cpu)"},
    {"backend", TEXT, ANY, C(backend), BOTH, NULL, "auto|cpu|ref, instead of a device (auto)"},
    {"threads", I32, NOT_NEGATIVE, C(threads), BOTH, NULL, "0 = OMP_NUM_THREADS or all cores (0)"},
    {"memory_limit", BYTES, NOT_NEGATIVE, C(memory_limit), BOTH, NULL, "bytes of a rank; 0 = none (0)"},
    {"ignore_memory", FLAG, ANY, S(ignore_memory), BOTH, NULL, "begin although the plan says that there is too little memory"},
};
#define N_OPTIONS ((int)(sizeof options / sizeof options[0]))
_Static_assert(N_OPTIONS <= MAX_OPTIONS, "raise MAX_OPTIONS");

/* What is being read, for error sentences: "--lr" or "FILE.json: lr". */
typedef struct source {
    const char *file;
    const option *o;
} source;

static void note(settings *s, const source *from) {
    s->origins[from->o - options] = from->file ? BY_FILE : BY_LINE;
}

static outcome wrong(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("error: ", stderr);
    vfprintf(stderr, format, arguments);
    fputs("\n", stderr);
    va_end(arguments);
    return OUTCOME_WRONG;
}

static outcome wrong_value(const source *from, const char *got, const char *expected) {
    return wrong("%s%s%s: got %s, expected %s", from->file ? from->file : "", from->file ? ": " : "--", from->o->name, got, expected);
}

/* Edits that make one word of the other, - and _ being the same. */
static size_t distance(const char *a, const char *b) {
    size_t row[64];
    const size_t n = strlen(b);
    if (n >= sizeof row / sizeof *row) return SIZE_MAX;
    for (size_t j = 0; j <= n; j++) row[j] = j;
    for (size_t i = 0; a[i]; i++) {
        size_t corner = row[0];
        row[0] = i + 1;
        for (size_t j = 1; j <= n; j++) {
            const size_t replaced = corner + (a[i] != b[j - 1] && !(a[i] == '-' && b[j - 1] == '_'));
            const size_t changed = (row[j] < row[j - 1] ? row[j] : row[j - 1]) + 1;
            corner = row[j];
            row[j] = replaced < changed ? replaced : changed;
        }
    }
    return row[n];
}

static const option *find(const char *name, int program) {
    for (int i = 0; i < N_OPTIONS; i++)
        if (options[i].programs & program && distance(name, options[i].name) == 0) return &options[i];
    return NULL;
}

static outcome unknown(const char *file, const char *name, int program) {
    const char *best = "help";
    for (int i = 0; i < N_OPTIONS; i++)
        if (options[i].programs & program && distance(name, options[i].name) < distance(name, best)) best = options[i].name;
    if (file) return wrong("%s: unknown key \"%s\"; did you mean \"%s\"?", file, name, best);
    return wrong("unknown option --%s; did you mean --%s? (--help lists them)", name, best);
}

static outcome check_range(const source *from, double value) {
    char got[32];
    snprintf(got, sizeof got, "%g", value);
    if (!isfinite(value)) return wrong_value(from, got, "a finite number");
    switch (from->o->range) {
    case POSITIVE:
        return value > 0 ? OUTCOME_RUN : wrong_value(from, got, "a positive number");
    case NOT_NEGATIVE:
        return value >= 0 ? OUTCOME_RUN : wrong_value(from, got, "0 or a positive number");
    case NOT_ZERO:
        return value != 0 ? OUTCOME_RUN : wrong_value(from, got, "a positive number, or a negative one for none");
    case ANY:
        break;
    }
    return OUTCOME_RUN;
}

static outcome set_real(settings *s, const source *from, double value) {
    const outcome fine = check_range(from, value);
    if (fine != OUTCOME_RUN) return fine;
    char got[32];
    snprintf(got, sizeof got, "%g", value);
    /* 0 in a config means the default: a number too small for a float must not become it, nor one too large infinity. */
    if (isinf((float)value) || (value != 0 && (float)value == 0)) return wrong_value(from, got, "a number that a float can hold");
    *(float *)((char *)s + from->o->offset) = (float)value;
    return OUTCOME_RUN;
}

static outcome set_integer(settings *s, const source *from, long long value) {
    void *field = (char *)s + from->o->offset;
    const outcome fine = check_range(from, (double)value);
    if (fine != OUTCOME_RUN) return fine;
    char got[32];
    snprintf(got, sizeof got, "%lld", value);
    if (from->o->type == I32 && (value > INT32_MAX || value < INT32_MIN)) return wrong_value(from, got, "at most 2147483647");
    if (from->o->type == BYTES && value < 0) return wrong_value(from, got, "0 or more");
    if (from->o->type == I32)
        *(int32_t *)field = (int32_t)value;
    else if (from->o->type == BYTES)
        *(size_t *)field = (size_t)value;
    else
        memcpy(field, &value, sizeof value); /* int64_t */
    return OUTCOME_RUN;
}

/* 0 to 2^64-1; in JSON, whose readers stop at 2^63-1, also as a string of digits. */
static outcome set_u64(settings *s, const source *from, const char *text) {
    char *end;
    errno = 0;
    const unsigned long long value = strtoull(text, &end, 10);
    if (*text < '0' || *text > '9' || *end || errno != 0) return wrong_value(from, text, "a whole number from 0 to 18446744073709551615");
    *(uint64_t *)((char *)s + from->o->offset) = value;
    return OUTCOME_RUN;
}

/* Those of the line stand in for those of the file. */
static outcome add_reward(settings *s, const source *from, const char *text) {
    const origin here = from->file ? BY_FILE : BY_LINE;
    if (s->rewards_from != here) s->n_rewards = 0;
    s->rewards_from = here;
    if (s->n_rewards == MAX_REWARDS) return wrong("--%s: got more than %d, expected fewer", from->o->name, MAX_REWARDS);
    char *description = malloc(strlen(text) + sizeof "cmd:");
    if (!description) return wrong("no memory for a reward's description");
    sprintf(description, "%s%s", from->o->type == COMMAND ? "cmd:" : "", text);
    free((char *)s->reward_text[s->n_rewards]);
    s->reward_text[s->n_rewards++] = description;
    return *text ? OUTCOME_RUN : wrong_value(from, "nothing", "a reward");
}

static const choice *find_choice(const choice *list, const char *word, size_t length) {
    for (; list->word; list++)
        if (strlen(list->word) == length && memcmp(list->word, word, length) == 0) return list;
    return NULL;
}

static outcome set_targets(settings *s, const source *from, const char *text) {
    unsigned set = 0;
    for (const char *word = text;; word++) {
        const size_t length = strcspn(word, ",");
        const choice *c = find_choice(from->o->choices, word, length);
        if (!c) return wrong_value(from, text, from->o->help);
        set |= (unsigned)c->value;
        word += length;
        if (!*word) break;
    }
    *(unsigned *)((char *)s + from->o->offset) = set;
    return OUTCOME_RUN;
}

static outcome set_word(settings *s, const source *from, const char *text) {
    void *field = (char *)s + from->o->offset;
    if (from->o->type == TEXT) {
        *(const char **)field = text;
        return *text ? OUTCOME_RUN : wrong_value(from, "nothing", "a text");
    }
    if (from->o->type == TARGETS) return set_targets(s, from, text);
    if (from->o->type == U64) return set_u64(s, from, text);
    if (from->o->type == REWARD || from->o->type == COMMAND) return add_reward(s, from, text);
    const choice *c = find_choice(from->o->choices, text, strlen(text));
    if (!c) return wrong_value(from, text, from->o->help);
    memcpy(field, &c->value, sizeof c->value); /* enumerations of the library are ints */
    return OUTCOME_RUN;
}

/* From the command line, where everything is text. */
static outcome set_text(settings *s, const source *from, const char *text) {
    char *end;
    errno = 0;
    note(s, from);
    switch (from->o->type) {
    case REAL: {
        const double value = strtod(text, &end);
        return *text && !*end ? set_real(s, from, value) : wrong_value(from, text, "a number");
    }
    case I32:
    case I64:
    case BYTES: {
        const long long value = strtoll(text, &end, 10);
        return *text && !*end && errno == 0 ? set_integer(s, from, value) : wrong_value(from, text, "a whole number");
    }
    default:
        return set_word(s, from, text);
    }
}

static outcome set_json(settings *s, const source *from, const json_t *value) {
    note(s, from);
    switch (from->o->type) {
    case REWARD:
    case COMMAND: {
        outcome fine = json_is_string(value) ? add_reward(s, from, json_string_value(value)) : OUTCOME_RUN;
        if (!json_is_string(value) && !json_is_array(value)) return wrong_value(from, "another type", "a string or a list of strings");
        for (size_t i = 0; i < json_array_size(value) && fine == OUTCOME_RUN; i++) {
            const char *text = json_string_value(json_array_get(value, i));
            fine = text ? add_reward(s, from, text) : wrong_value(from, "another type", "a list of strings");
        }
        return fine;
    }
    case U64: {
        char digits[32];
        if (json_is_string(value)) return set_u64(s, from, json_string_value(value));
        if (!json_is_integer(value)) return wrong_value(from, "another type", "a whole number");
        snprintf(digits, sizeof digits, "%lld", (long long)json_integer_value(value));
        return set_u64(s, from, digits);
    }
    case FLAG:
        if (!json_is_boolean(value)) return wrong_value(from, "another type", "true or false");
        *(bool *)((char *)s + from->o->offset) = json_is_true(value);
        return OUTCOME_RUN;
    case REAL:
        return json_is_number(value) ? set_real(s, from, json_number_value(value)) : wrong_value(from, "another type", "a number");
    case I32:
    case I64:
    case BYTES:
        return json_is_integer(value) ? set_integer(s, from, json_integer_value(value))
                                      : wrong_value(from, "another type", "a whole number");
    default:
        return json_is_string(value) ? set_word(s, from, json_string_value(value)) : wrong_value(from, "another type", "a string");
    }
}

static outcome load_file(settings *s, const char *path) {
    json_error_t error;
    s->file = json_load_file(path, JSON_REJECT_DUPLICATES, &error);
    if (!s->file) return wrong("%s:%d: %s", path, error.line, error.text);
    return json_is_object(s->file) ? OUTCOME_RUN : wrong("%s: got another JSON value, expected an object of settings", path);
}

static outcome read_file(settings *s, const char *path, int program) {
    const char *key;
    json_t *value;
    json_object_foreach(s->file, key, value) {
        const source from = {path, find(key, program)};
        const outcome fine = from.o ? set_json(s, &from, value) : unknown(path, key, program);
        if (fine != OUTCOME_RUN) return fine;
    }
    return OUTCOME_RUN;
}

static outcome help(const char *program_name, int program) {
    printf("usage: %s --model DIR --train F.jsonl [--eval F.jsonl] [--out DIR] [options]\n\n"
           "Trains the LoRA adapter of a mixture-of-experts model by %s.\n"
           "  --config FILE.json           settings as JSON; options on the command line win\n"
           "  --help                       this text\n",
           program_name, program == GRPO ? "GRPO" : "supervised fine-tuning");
    for (int i = 0; i < N_OPTIONS; i++) {
        char name[32];
        size_t n = 0;
        if (!(options[i].programs & program)) continue;
        for (; options[i].name[n]; n++) name[n] = options[i].name[n] == '_' ? '-' : options[i].name[n];
        name[n] = '\0';
        printf("  --%-26s %s\n", name, options[i].help);
    }
    return OUTCOME_HELP;
}

/* The value of "--name value" or "--name=value"; *used: how many arguments that took. */
static outcome read_option(settings *s, int program, char **argv, const char **config, int *used) {
    char name[64];
    const char *text = argv[0] + 2, *equal = strchr(text, '=');
    const size_t length = equal ? (size_t)(equal - text) : strlen(text);
    if (strncmp(argv[0], "--", 2) != 0 || length == 0 || length >= sizeof name)
        return wrong("got argument %s, expected an option like --steps 60 (--help lists them)", argv[0]);
    memcpy(name, text, length);
    name[length] = '\0';
    const bool is_config = strcmp(name, "config") == 0;
    const source from = {NULL, is_config ? NULL : find(name, program)};
    if (!is_config && !from.o) return unknown(NULL, name, program);
    *used = 1;
    if (from.o && from.o->type == FLAG) {
        if (equal) return wrong_value(&from, equal + 1, "no value");
        note(s, &from);
        *(bool *)((char *)s + from.o->offset) = true;
        return OUTCOME_RUN;
    }
    const char *value = equal ? equal + 1 : argv[1];
    if (!value) return wrong("--%s: got nothing, expected a value", name);
    *used = equal ? 1 : 2;
    if (!is_config) return set_text(s, &from, value);
    *config = value;
    return OUTCOME_RUN;
}

static outcome read_line(settings *s, int program, int argc, char **argv, const char **config) {
    outcome fine = OUTCOME_RUN;
    for (int i = 1, used = 1; i < argc && fine == OUTCOME_RUN; i += used) {
        if (strcmp(argv[i], "--help") == 0 || strcmp(argv[i], "-h") == 0) return help(argv[0], program);
        fine = read_option(s, program, argv + i, config, &used);
    }
    return fine;
}

static void begin(settings *s, esp_trainer_kind kind) {
    s->model_dir = s->preset = s->plot_file = NULL;
    s->dry_run = false;
    s->ctx = ESP_CTX_CONFIG();
    s->model = ESP_MODEL_CONFIG();
    s->trainer = ESP_TRAINER_CONFIG(.kind = kind, .objective = ESP_OBJECTIVE(), .adamw = ESP_ADAMW_CONFIG());
    s->n_rewards = 0;
    memset(s->origins, 0, sizeof s->origins);
}

static size_t width(type t) {
    return t == TEXT    ? sizeof(char *)
           : t == FLAG  ? sizeof(bool)
           : t == BYTES ? sizeof(size_t)
           : t == I64   ? sizeof(int64_t)
           : t == U64   ? sizeof(uint64_t)
                        : sizeof(int32_t);
}

static outcome apply_preset(settings *s, const char *name, int program) {
    settings before = *s;
    if (esp_trainer_preset(&s->trainer, name) != ESP_OK) return wrong("--%s", esp_last_error());
    for (int i = 0; i < N_OPTIONS; i++) {
        const option *o = &options[i];
        if (!(o->programs & program) || o->type == REWARD || o->type == COMMAND) continue;
        if (memcmp((char *)s + o->offset, (char *)&before + o->offset, width(o->type)) != 0) s->origins[i] = BY_PRESET;
    }
    return OUTCOME_RUN;
}

/* From the lowest layer up: preset, file, line. */
static outcome read_layers(settings *s, esp_trainer_kind kind, int argc, char **argv) {
    const int program = kind == ESP_TRAIN_GRPO ? GRPO : SFT;
    const char *config = NULL;
    begin(s, kind);
    outcome fine = read_line(s, program, argc, argv, &config);
    if (fine == OUTCOME_RUN && config) fine = load_file(s, config);
    const char *preset = s->preset ? s->preset : json_string_value(json_object_get(s->file, "preset"));
    if (fine != OUTCOME_RUN || (!config && !preset)) return fine;
    begin(s, kind);
    if (preset) fine = apply_preset(s, preset, program);
    if (fine == OUTCOME_RUN && config) fine = read_file(s, config, program);
    return fine == OUTCOME_RUN ? read_line(s, program, argc, argv, &config) : fine;
}

static outcome open_rewards(settings *s) {
    for (int i = 0; i < s->n_rewards; i++)
        if (esp_reward_open(&s->rewards[i], s->reward_text[i]) != ESP_OK)
            return wrong("--reward %s: %s", s->reward_text[i], esp_last_error());
    if (s->n_rewards > 0) {
        s->trainer.rewards = s->rewards;
        s->trainer.n_rewards = s->n_rewards;
    }
    return OUTCOME_RUN;
}

outcome settings_read(settings *s, esp_trainer_kind kind, int argc, char **argv) {
    *s = (settings){.file = NULL};
    outcome fine = read_layers(s, kind, argc, argv);
    if (fine == OUTCOME_RUN && !s->model_dir) fine = wrong("--model: got nothing, expected a Hugging Face folder (--help lists all)");
    if (fine == OUTCOME_RUN && !s->trainer.train_file && !s->trainer.rollouts)
        fine = wrong("--train: got nothing, expected a JSONL file (--help lists all)");
    if (fine == OUTCOME_RUN && s->device && s->ctx.backend) fine = wrong("--device and --backend: got both, expected one");
    if (fine == OUTCOME_RUN && s->device) s->ctx.backend = strcmp(s->device, "auto") == 0 ? "any" : s->device;
    s->model.seed = s->trainer.seed;
    return fine == OUTCOME_RUN ? open_rewards(s) : fine;
}

void settings_free(settings *s) {
    for (int i = 0; i < MAX_REWARDS; i++) {
        esp_reward_close(&s->rewards[i]);
        free((char *)s->reward_text[i]);
    }
    json_decref(s->file);
    s->file = NULL;
}

static void value_text(char *out, size_t size, const settings *s, const option *o) {
    const void *field = (const char *)s + o->offset;
    int word;
    switch (o->type) {
    case TEXT:
        snprintf(out, size, "%s", *(const char *const *)field ? *(const char *const *)field : "-");
        return;
    case I32:
        snprintf(out, size, "%d", *(const int32_t *)field);
        return;
    case I64:
        snprintf(out, size, "%lld", (long long)*(const int64_t *)field);
        return;
    case U64:
        snprintf(out, size, "%llu", (unsigned long long)*(const uint64_t *)field);
        return;
    case BYTES:
        snprintf(out, size, "%zu", *(const size_t *)field);
        return;
    case REAL:
        snprintf(out, size, "%g", (double)*(const float *)field);
        return;
    case FLAG:
        snprintf(out, size, "%s", *(const bool *)field ? "true" : "false");
        return;
    case CHOICE:
    case TARGETS:
        memcpy(&word, field, sizeof word);
        snprintf(out, size, "%d", word);
        for (const choice *c = o->choices; c->word; c++)
            if (c->value == word) snprintf(out, size, "%s", c->word);
        return;
    case REWARD:
    case COMMAND:
        out[0] = '\0';
        for (int i = 0; i < s->n_rewards && strlen(out) + 2 < size; i++)
            snprintf(out + strlen(out), size - strlen(out), "%s%s", i ? ", " : "", s->reward_text[i]);
        return;
    }
}

void settings_print(const settings *s) {
    static const char *const from[] = {"default", "preset", "config", "option"};
    const int program = s->trainer.kind == ESP_TRAIN_GRPO ? GRPO : SFT;
    for (int i = 0; i < N_OPTIONS; i++) {
        const option *o = &options[i];
        char value[256];
        if (!(o->programs & program) || o->type == COMMAND) continue;
        value_text(value, sizeof value, s, o);
        /* A default may be anything that the help names; 0 in the struct stands for it. */
        const bool unset = s->origins[i] == BY_DEFAULT && !(o->type == REWARD && s->n_rewards > 0);
        printf("  %-26s %-20s %-8s %s\n", o->name, unset ? "-" : value,
               from[unset               ? BY_DEFAULT
                    : o->type == REWARD ? s->rewards_from
                                        : s->origins[i]],
               o->help);
    }
}
