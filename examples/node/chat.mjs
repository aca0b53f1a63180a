// Two turns of one conversation, streamed. Usage: npm install && node chat.mjs [HOST:PORT]
// The .proto files are read from PROTO_PATH, by default from this repository.
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import grpc from '@grpc/grpc-js';
import protoLoader from '@grpc/proto-loader';

const target = process.argv[2] ?? '127.0.0.1:50051';
const protos = process.env.PROTO_PATH ?? fileURLToPath(new URL('../../proto', import.meta.url));

const { apiary } = grpc.loadPackageDefinition(
  protoLoader.loadSync(['apiary/v1/generation.proto', 'apiary/v1/session.proto'], {
    includeDirs: [protos],
    enums: String,
    longs: String,
  }),
);
const sessions = new apiary.v1.SessionService(target, grpc.credentials.createInsecure());
const generation = new apiary.v1.GenerationService(target, grpc.credentials.createInsecure());

const createSession = promisify(sessions.createSession.bind(sessions));
const deleteSession = promisify(sessions.deleteSession.bind(sessions));

// Routers read the session's name from the metadata, so send it with each call that names one.
function about(session) {
  const metadata = new grpc.Metadata();
  metadata.set('x-apiary-session', session);
  return metadata;
}

const { name: session } = await createSession({ session: { ttl: { seconds: 600 } } });
try {
  for (const content of ['My favourite colour is teal.', 'What is my favourite colour?']) {
    console.log(`> ${content}`);
    const call = generation.streamGenerate(
      {
        session,
        messages: { messages: [{ role: 'ROLE_USER', content }] },
        stopping: { maxTokens: 64 },
      },
      about(session),
      { deadline: Date.now() + 120_000 },
    );
    for await (const delta of call) {
      process.stdout.write(delta.text ?? '');
      if (delta.usage) console.log(`\n[${delta.finishReason}, ${delta.usage.completionTokens} tokens]`);
    }
  }
} finally {
  await deleteSession({ name: session }, about(session));
  sessions.close();
  generation.close();
}
