# The tag is the version in go.mod.
FROM golang:1.26.8-alpine AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN CGO_ENABLED=0 go build -trimpath -ldflags="-s -w" -o /ownllm .

# The program itself is static. A shell, wget and openssl are for docker-compose.yml: its
# health checks, its first key, its certificates.
FROM alpine:3.22
RUN apk add --no-cache ca-certificates openssl && \
    adduser -D -H -u 65532 ownllm && \
    install -d -o ownllm -m 0700 /data
COPY --from=build /ownllm /usr/local/bin/ownllm
USER ownllm
VOLUME /data
ENV OWNLLM_DATA_DIR=/data
EXPOSE 9191 9192
HEALTHCHECK --interval=5s --start-period=30s CMD ["wget", "-q", "-O", "/dev/null", "http://127.0.0.1:9192/healthz"]
ENTRYPOINT ["ownllm"]
CMD ["--help"]
