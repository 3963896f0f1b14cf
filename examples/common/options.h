/* Settings of espalier-sft and espalier-grpo: one table says what each is called, on the command line and in a --config file. */
#ifndef EXAMPLES_OPTIONS_H
#define EXAMPLES_OPTIONS_H

#include <espalier/espalier.h>

#include <jansson.h>

#define MAX_REWARDS 16
#define MAX_OPTIONS 160

/* Where a value came from; each wins over those before it. */
typedef enum origin { BY_DEFAULT, BY_PRESET, BY_FILE, BY_LINE } origin;

typedef struct settings {
    const char *model_dir;
    const char *preset;
    const char *plot_file; /* drawn anew while the run goes on */
    bool dry_run, ignore_memory;
    const char *device; /* cuda, cpu, auto: a GPU where one is usable */
    esp_ctx_config ctx;
    esp_model_config model;
    esp_trainer_config trainer;
    const char *reward_text[MAX_REWARDS]; /* descriptions, see esp_reward_open */
    esp_reward rewards[MAX_REWARDS];
    int n_rewards;
    origin rewards_from;
    origin origins[MAX_OPTIONS]; /* of each row of the table */
    json_t *file;                /* of --config; strings of the settings may live in it */
} settings;

typedef enum outcome { OUTCOME_RUN, OUTCOME_HELP, OUTCOME_WRONG } outcome;

/* Options over the config file over the library's defaults.  Tells on standard output what --help asks for, on standard error what is
 * wrong. */
outcome settings_read(settings *s, esp_trainer_kind kind, int argc, char **argv);
void settings_free(settings *s);
/* Every option: its value, where that came from, what it does. */
void settings_print(const settings *s);

#endif
