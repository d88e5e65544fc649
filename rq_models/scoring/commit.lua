-- Enter a finished chunk, if its execution is not given up and its run goes on.
--
-- KEYS  1 rq:wip zset of the queue, 2 the run, 3 what is done of it, 4 the job that planned it, whose meta shows it
-- ARGV  1 member of the wip zset, 2 attempt, 3 number of the chunk, 4 its part (JSON), 5 rows, 6 failed rows,
--       7 failed rows that are too many ('': never), 8 how many chunks there are, 9 seconds to keep the run, 10 time now
-- Returns how many chunks are left, or false.
local call = redis.call
local state, attempt = unpack(call('HMGET', KEYS[2], 'state', 'attempt'))
if state ~= 'running' or attempt ~= ARGV[2] or not call('ZSCORE', KEYS[1], ARGV[1]) then
  return false
end
if call('HSETNX', KEYS[3], ARGV[3], ARGV[4]) == 0 then
  -- By an execution that died right after this script.
  return tonumber(ARGV[8]) - call('HLEN', KEYS[3])
end
local rows = call('HINCRBY', KEYS[2], 'rows', ARGV[5])
local failed = call('HINCRBY', KEYS[2], 'failed', ARGV[6])
local done = call('HLEN', KEYS[3])
call('HSET', KEYS[2], 'done', done)
call('EXPIRE', KEYS[2], ARGV[9])
call('EXPIRE', KEYS[3], ARGV[9])
if call('EXISTS', KEYS[4]) == 1 then
  call('HSET', KEYS[4], 'meta', cjson.encode({rows = rows, failed = failed, chunks_done = done,
    chunks = tonumber(ARGV[8])}))
end
if ARGV[7] ~= '' and failed > tonumber(ARGV[7]) then
  call('HSET', KEYS[2], 'state', 'failed', 'ended_at', ARGV[10], 'error',
    failed .. ' rows failed, more than max_errors (' .. ARGV[7] .. ')')
  return false
end
return tonumber(ARGV[8]) - done
