/* Settings of espalier-sft and espalier-grpo: one table says what each is called, on the command line and in a --config file. */
#ifndef EXAMPLES_OPTIONS_H
#define EXAMPLES_OPTIONS_H

#include <espalier/espalier.h>

#include <jansson.h>

typedef struct settings {
    const char *model_dir;
    esp_ctx_config ctx;
    esp_model_config model;
    esp_trainer_config trainer;
    json_t *file; /* of --config; strings of the settings may live in it */
} settings;

typedef enum outcome { OUTCOME_RUN, OUTCOME_HELP, OUTCOME_WRONG } outcome;

/* Options over the config file over the library's defaults.  Tells on standard output what --help asks for, on standard error what is
 * wrong. */
outcome settings_read(settings *s, esp_trainer_kind kind, int argc, char **argv);
void settings_free(settings *s);

#endif
