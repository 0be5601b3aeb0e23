FROM golang:1.26-alpine AS build
WORKDIR /src
COPY go.mod go.sum ./
RUN go mod download
COPY . .
RUN CGO_ENABLED=0 go build -trimpath -ldflags="-s -w" -o /ownllm .

FROM alpine:3.22
RUN apk add --no-cache ca-certificates && \
    adduser -D -H -u 65532 ownllm && \
    install -d -o ownllm -m 0700 /data
COPY --from=build /ownllm /usr/local/bin/ownllm
USER ownllm
VOLUME /data
ENV OWNLLM_DATA_DIR=/data
EXPOSE 9191 9192
ENTRYPOINT ["ownllm"]
CMD ["--help"]
