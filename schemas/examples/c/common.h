/* What the examples share: a connection, and an end with a sentence. */

#ifndef COMMON_H
#define COMMON_H

#include <cjson/cJSON.h>
#include <nats/nats.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Others send more than the stream takes in. */
#define TOO_MANY_REQUESTS 10167

/* Ends the program unless all went well. */
static inline void must(natsStatus status, const char *what)
{
    if (status != NATS_OK) {
        fprintf(stderr, "%s: %s\n", what, natsStatus_GetText(status));
        exit(1);
    }
}

/* Where answers come back: NATS_INBOX_PREFIX, else `otherwise`. With permissions each role has a place of its own. */
static inline const char *inbox_prefix(const char *otherwise)
{
    const char *prefix = getenv("NATS_INBOX_PREFIX");

    return prefix != NULL ? prefix : otherwise;
}

/* A connection to NATS_URL, as README.md says, that comes back after each break. */
static inline natsConnection *connected(const char *prefix)
{
    natsOptions *options = NULL;
    natsConnection *nc = NULL;
    const char *url = getenv("NATS_URL");

    must(natsOptions_Create(&options), "options");
    must(natsOptions_SetURL(options, url != NULL ? url : "nats://127.0.0.1:4222"), "NATS_URL");
    if (getenv("NATS_CREDS") != NULL)
        must(natsOptions_SetUserCredentialsFromFiles(options, getenv("NATS_CREDS"), NULL), "NATS_CREDS");
    if (getenv("NATS_USER") != NULL)
        must(natsOptions_SetUserInfo(options, getenv("NATS_USER"), getenv("NATS_PASSWORD")), "NATS_USER");
    if (getenv("NATS_TOKEN") != NULL)
        must(natsOptions_SetToken(options, getenv("NATS_TOKEN")), "NATS_TOKEN");
    if (getenv("NATS_CA") != NULL)
        must(natsOptions_LoadCATrustedCertificates(options, getenv("NATS_CA")), "NATS_CA");
    if (getenv("NATS_CERT") != NULL)
        must(natsOptions_LoadCertificatesChain(options, getenv("NATS_CERT"), getenv("NATS_KEY")), "NATS_CERT");
    must(natsOptions_SetSecure(options, getenv("NATS_CA") != NULL || getenv("NATS_CERT") != NULL), "TLS");
    must(natsOptions_SetMaxReconnect(options, -1), "options");
    must(natsOptions_SetCustomInboxPrefix(options, prefix), "options");
    must(natsConnection_Connect(&nc, options), "connect");
    natsOptions_Destroy(options);
    return nc;
}

/* The text of a field, "" if there is none. */
static inline const char *text_of(const cJSON *object, const char *name)
{
    const char *text = cJSON_GetStringValue(cJSON_GetObjectItemCaseSensitive(object, name));
    return text != NULL ? text : "";
}

/* The number in a field, 0 if there is none. */
static inline double number_of(const cJSON *object, const char *name)
{
    const cJSON *field = cJSON_GetObjectItemCaseSensitive(object, name);
    return cJSON_IsNumber(field) ? field->valuedouble : 0;
}

/* Requests until the stream has confirmed that it has the command. The id in the body makes the repeats one.
   `reply_to`: where the receipt of a bind goes, too, or NULL. */
static inline void store(natsConnection *nc, const char *subject, const cJSON *body, const char *reply_to)
{
    char *text = cJSON_PrintUnformatted(body);
    bool stored = false;

    while (!stored) {
        natsMsg *msg = NULL, *answer = NULL;
        natsStatus status;

        must(natsMsg_Create(&msg, subject, NULL, text, (int) strlen(text)), subject);
        if (reply_to != NULL)
            must(natsMsgHeader_Set(msg, "Reply-To", reply_to), subject);
        status = natsConnection_RequestMsg(&answer, nc, msg, 5000);
        if (status == NATS_OK) {
            cJSON *ack = cJSON_ParseWithLength(natsMsg_GetData(answer), natsMsg_GetDataLength(answer));
            const cJSON *error = cJSON_GetObjectItemCaseSensitive(ack, "error");

            stored = ack != NULL && error == NULL;
            if (error != NULL && number_of(error, "code") != 503 && number_of(error, "err_code") != TOO_MANY_REQUESTS) {
                fprintf(stderr, "%s\n", text_of(error, "description"));
                exit(1);
            }
            cJSON_Delete(ack);
        } else if (status != NATS_TIMEOUT && status != NATS_NO_RESPONDERS) {
            must(status, subject);
        }
        natsMsg_Destroy(answer);
        natsMsg_Destroy(msg);
        if (!stored)
            nats_Sleep(1000); /* no stream now, or others send more than it takes in */
    }
    free(text);
}

#endif
