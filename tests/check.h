/* Tests include this first: cmocka with the headers that it needs, libc, and checks that several tests use. */
#ifndef CHECK_H
#define CHECK_H

#ifndef _POSIX_C_SOURCE
#define _POSIX_C_SOURCE 200809L
#endif
#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#include <unistd.h>
#if defined(_WIN32)
#include <io.h>
#include <windows.h>

/* These functions of POSIX are missing on Windows. */
static inline char *mkdtemp(char *path) { return _mktemp(path) && !mkdir(path) ? path : NULL; }

static inline int rename_utf8(const char *old_path, const char *new_path) {
    wchar_t old_wide[260], new_wide[260];
    MultiByteToWideChar(CP_UTF8, 0, old_path, -1, old_wide, 260);
    MultiByteToWideChar(CP_UTF8, 0, new_path, -1, new_wide, 260);
    return _wrename(old_wide, new_wide);
}
#else
#define rename_utf8 rename
#endif

/* Sanitizers make tests many times slower. So large cases run only in the plain build, and the thread sanitizer skips
   most single-threaded work. */
#if defined(__SANITIZE_ADDRESS__)
#define SANITIZED true
#elif defined(__SANITIZE_THREAD__)
#define SANITIZED true
#define THREAD_SANITIZED true
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SANITIZED true
#endif
#endif
#ifndef SANITIZED
#define SANITIZED false
#endif
#ifndef THREAD_SANITIZED
#define THREAD_SANITIZED false
#endif

/* Returns true if text[n] is UTF-8 by RFC 3629: no overlong forms, no surrogates, nothing above U+10FFFF, no incomplete
   character. */
static inline bool is_utf8(const char *text, size_t n) {
    const uint8_t *p = (const uint8_t *)text, *end = p + n;
    while (p < end) {
        uint8_t lead = *p++, least = 0x80, most = 0xBF;
        int more = lead < 0x80                   ? 0
                   : lead >= 0xC2 && lead < 0xE0 ? 1
                   : lead >= 0xE0 && lead < 0xF0 ? 2
                   : lead >= 0xF0 && lead < 0xF5 ? 3
                                                 : -1;
        if (more < 0 || more > end - p) return false;
        if (lead == 0xE0) least = 0xA0;
        if (lead == 0xED) most = 0x9F;
        if (lead == 0xF0) least = 0x90;
        if (lead == 0xF4) most = 0x8F;
        for (; more > 0; more--, p++, least = 0x80, most = 0xBF)
            if (*p < least || *p > most) return false;
    }
    return true;
}

#endif
